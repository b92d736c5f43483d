//! The spelling that byte-level BPE vocabularies use: one printable character per byte.
//!
//! The bytes that Latin-1 prints stand for themselves; the other 68 are U+0100 and up, in order
//! (OpenAI's GPT-2 release defined it, `bytes_to_unicode`). So a space is `Ġ`, a newline `Ċ`.

/// Whether Latin-1 prints the byte, so that its own code point spells it.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character that spells each byte.
pub(super) fn alphabet() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        if is_printable(byte as u8) {
            return char::from(byte as u8);
        }
        let spelled = char::from_u32(next).expect("68 code points from U+0100 are characters");
        next += 1;
        spelled
    })
}

/// Spelled tokens back to bytes.
pub(super) struct Spelling {
    /// The byte of each character below U+0144, the first one past the alphabet.
    bytes: [Option<u8>; 0x144],
}

impl Spelling {
    pub(super) fn new() -> Self {
        let mut bytes = [None; 0x144];
        for (byte, spelled) in (0..=u8::MAX).zip(alphabet()) {
            bytes[spelled as usize] = Some(byte);
        }
        Spelling { bytes }
    }

    /// The bytes of a token. One that has a character outside the alphabet was never spelled: it
    /// is its own UTF-8.
    pub(super) fn bytes_of(&self, token: &str) -> Vec<u8> {
        token
            .chars()
            .map(|character| self.bytes.get(character as usize).copied().flatten())
            .collect::<Option<Vec<u8>>>()
            .unwrap_or_else(|| token.as_bytes().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_spelled_by_its_own_character_and_read_back() {
        let spelling = Spelling::new();
        for (byte, spelled) in (0..=u8::MAX).zip(alphabet()) {
            assert_eq!(spelling.bytes_of(&spelled.to_string()), [byte]);
        }
        assert_eq!(alphabet()[b' ' as usize], 'Ġ');
        assert_eq!(alphabet()[b'\n' as usize], 'Ċ');
        assert_eq!(alphabet()[0xAD], 'Ń');
    }

    #[test]
    fn a_token_outside_the_alphabet_is_its_own_utf8() {
        assert_eq!(Spelling::new().bytes_of("a▁b"), "a▁b".as_bytes());
    }
}
