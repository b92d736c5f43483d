//! Text from ids as they come, never half a character.

use super::{LeadingSpace, Tokenizer, TokenizerError};

/// Turns a stream of ids into text. Joined, what [`push`](Self::push) and
/// [`finish`](Self::finish) return is exactly what [`Tokenizer::decode`] makes of all ids at once.
///
/// It holds back at most the three bytes of an unfinished character, so an id costs as much as its
/// own bytes however long the text is. It keeps no reference to its tokenizer: give it the same one
/// each time.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    skip_special: bool,
    leading_space: LeadingSpace,
    /// Bytes that may still become a character.
    pending: Vec<u8>,
    /// What the last call returned; kept for its memory.
    text: String,
}

impl Detokenizer {
    /// For ids that begin a text: the space that SentencePiece vocabularies put before the first
    /// word is left out.
    pub fn from_start(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let leading_space = tokenizer.ends.leading_space;
        Detokenizer { leading_space, ..Self::within(skip_special) }
    }

    /// For ids that continue a text, such as what a model writes after its prompt: a space that the
    /// first of them begins with belongs to the text.
    pub fn within(skip_special: bool) -> Self {
        Detokenizer {
            skip_special,
            leading_space: LeadingSpace::Kept,
            pending: Vec::new(),
            text: String::new(),
        }
    }

    /// The text that is certain now that `id` has come; empty while a character is unfinished.
    /// Bytes that cannot belong to a character become U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`]; the stream is as before.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<&str, TokenizerError> {
        self.text.clear();
        let mut bytes = tokenizer.token_bytes(id)?;
        if self.skip_special && tokenizer.is_special(id) {
            bytes = &[];
        }
        if self.leading_space != LeadingSpace::Kept && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            if self.leading_space == LeadingSpace::Dropped || !bytes.is_empty() {
                self.leading_space = LeadingSpace::Kept;
            }
        }
        self.pending.extend_from_slice(bytes);

        let mut rest = self.pending.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(valid) => {
                    self.text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (valid, broken) = rest.split_at(error.valid_up_to());
            self.text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
            rest = broken;
            match error.error_len() {
                Some(length) => {
                    self.text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
                None => break,
            }
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
        Ok(&self.text)
    }

    /// What is left when no more ids come: U+FFFD for an unfinished character, or nothing. The
    /// stream can go on after it.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.pending.is_empty() {
            // An unfinished character is one maximal part, hence one replacement.
            self.pending.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        &self.text
    }
}
