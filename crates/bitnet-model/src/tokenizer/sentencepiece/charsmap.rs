//! SentencePiece's `precompiled_charsmap`: which characters become which, as a double-array trie
//! (the layout of Susumu Yata's darts-clone) before the replacement texts.
//!
//! Layout: `u32` size of the trie in bytes, the trie as `u32` units, then texts that end in NUL. All
//! little-endian.

use super::super::TokenizerError;

/// Far beyond the longest replacement of any Unicode normalisation; bounds how much a text grows.
const MAX_REPLACEMENT_BYTES: usize = 256;

pub(super) struct CharsMap {
    units: Vec<u32>,
    texts: Vec<u8>,
}

impl CharsMap {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let parts = bytes
            .split_first_chunk::<4>()
            .and_then(|(size, rest)| rest.split_at_checked(u32::from_le_bytes(*size) as usize));
        let (trie, texts) = parts.ok_or_else(broken)?;
        let (units, []) = trie.as_chunks::<4>() else { return Err(broken()) };
        Ok(CharsMap {
            units: units.iter().map(|unit| u32::from_le_bytes(*unit)).collect(),
            texts: texts.to_vec(),
        })
    }

    /// What the longest known beginning of `text` becomes, and its length in bytes; `None` if the
    /// text begins with nothing known.
    pub(super) fn longest(&self, text: &str) -> Result<Option<(&str, usize)>, TokenizerError> {
        let unit = |position: u32| self.units.get(position as usize).copied().ok_or_else(broken);
        let offset = |unit: u32| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let mut position = offset(unit(0)?);
        let mut longest = None;
        for (index, byte) in text.bytes().enumerate() {
            position ^= u32::from(byte);
            let child = unit(position)?;
            // A unit holds the byte it stands for; bit 31 marks values, which stand for none.
            if child & ((1 << 31) | 0xFF) != u32::from(byte) {
                break;
            }
            position ^= offset(child);
            let has_value = child & (1 << 8) != 0;
            if has_value {
                longest = Some((unit(position)? & !(1 << 31), index + 1));
            }
        }
        let Some((start, length)) = longest else { return Ok(None) };
        // A value may be reached inside a character only in a broken map.
        if !text.is_char_boundary(length) {
            return Err(broken());
        }
        let replacement = self.texts.get(start as usize..).ok_or_else(broken)?;
        let end = replacement.iter().take(MAX_REPLACEMENT_BYTES).position(|byte| *byte == 0);
        let replacement = std::str::from_utf8(&replacement[..end.ok_or_else(broken)?]);
        Ok(Some((replacement.map_err(|_| broken())?, length)))
    }
}

fn broken() -> TokenizerError {
    TokenizerError::vocabulary("the tokenizer's map of characters (precompiled_charsmap) is broken")
}
