//! SentencePiece's `tokenizer.model`: a protocol-buffer message, of which a few fields are read and
//! written.
//!
//! Field numbers are those of google/sentencepiece's `sentencepiece_model.proto`.

use super::super::TokenizerError;
use super::{Algorithm, Description, Kind, Piece};
use crate::protobuf::{Broken, Wire, fields};

impl From<Broken> for TokenizerError {
    fn from(_: Broken) -> Self {
        broken()
    }
}

fn broken() -> TokenizerError {
    TokenizerError::vocabulary("this is not a SentencePiece model, or it is cut short")
}

/// Reads a model. Where a field is absent, the default of the format holds.
pub(super) fn read(bytes: &[u8]) -> Result<Description, TokenizerError> {
    let mut description = Description {
        pieces: Vec::new(),
        algorithm: Algorithm::Unigram,
        byte_fallback: false,
        add_dummy_prefix: true,
        remove_extra_whitespaces: true,
        prefix_every_fragment: true,
        charsmap: Vec::new(),
        bos: Some(1),
        eos: Some(2),
    };
    for field in fields(bytes) {
        match field? {
            (1, Wire::Bytes(message)) => description.pieces.push(piece(message)?),
            (2, Wire::Bytes(message)) => trainer(message, &mut description)?,
            (3, Wire::Bytes(message)) => normalizer(message, &mut description)?,
            _ => {}
        }
    }
    let count = description.pieces.len();
    if count == 0 {
        return Err(broken());
    }
    let exists = |id: &u32| (*id as usize) < count;
    description.bos = description.bos.filter(exists);
    description.eos = description.eos.filter(exists);
    Ok(description)
}

fn piece(message: &[u8]) -> Result<Piece, TokenizerError> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    for field in fields(message) {
        match field? {
            (1, Wire::Bytes(text)) => {
                piece.text = std::str::from_utf8(text).map_err(|_| broken())?.to_owned();
            }
            (2, Wire::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (3, Wire::Varint(kind)) => {
                piece.kind = Kind::from_number(kind as i64).ok_or_else(broken)?;
            }
            _ => {}
        }
    }
    Ok(piece)
}

fn trainer(message: &[u8], description: &mut Description) -> Result<(), TokenizerError> {
    for field in fields(message) {
        match field? {
            (3, Wire::Varint(1)) => description.algorithm = Algorithm::Unigram,
            (3, Wire::Varint(2)) => description.algorithm = Algorithm::Bpe,
            (3, Wire::Varint(kind)) => {
                return Err(TokenizerError::vocabulary(format!(
                    "the SentencePiece model is of type {kind}, and only 1 (unigram) and 2 (BPE) \
                     are supported"
                )));
            }
            (24, Wire::Varint(1)) => {
                return Err(TokenizerError::vocabulary(
                    "the SentencePiece model treats spaces as suffixes, which is not supported",
                ));
            }
            (35, Wire::Varint(flag)) => description.byte_fallback = flag != 0,
            // Absent tokens have id -1.
            (41, Wire::Varint(id)) => description.bos = u32::try_from(id).ok(),
            (42, Wire::Varint(id)) => description.eos = u32::try_from(id).ok(),
            _ => {}
        }
    }
    Ok(())
}

fn normalizer(message: &[u8], description: &mut Description) -> Result<(), TokenizerError> {
    for field in fields(message) {
        match field? {
            (2, Wire::Bytes(charsmap)) => description.charsmap = charsmap.to_vec(),
            (3, Wire::Varint(flag)) => description.add_dummy_prefix = flag != 0,
            (4, Wire::Varint(flag)) => description.remove_extra_whitespaces = flag != 0,
            (5, Wire::Varint(0)) => {
                return Err(TokenizerError::vocabulary(
                    "the SentencePiece model does not escape spaces, which is not supported",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn put_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn put_number(message: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(message, field << 3);
    put_varint(message, value);
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(message, field << 3 | 2);
    put_varint(message, bytes.len() as u64);
    message.extend(bytes);
}

/// The file that [`read`] reads the same description from, but for what `tokenizer_config.json` says.
pub(in crate::tokenizer) fn write(description: &Description) -> Vec<u8> {
    let mut model = Vec::new();
    let mut unknown = None;
    for (id, piece) in (0u64..).zip(&description.pieces) {
        let mut message = Vec::new();
        put_bytes(&mut message, 1, piece.text.as_bytes());
        put_varint(&mut message, 2 << 3 | 5);
        message.extend(piece.score.to_le_bytes());
        put_number(&mut message, 3, piece.kind.number() as u64);
        put_bytes(&mut model, 1, &message);
        if piece.kind == Kind::Unknown {
            unknown = Some(id);
        }
    }
    let algorithm = match description.algorithm {
        Algorithm::Unigram => 1,
        Algorithm::Bpe => 2,
    };
    // Absent tokens have id -1.
    let id = |id: Option<u32>| id.map_or(u64::MAX, u64::from);
    let mut trainer = Vec::new();
    put_number(&mut trainer, 3, algorithm);
    put_number(&mut trainer, 35, u64::from(description.byte_fallback));
    put_number(&mut trainer, 40, unknown.unwrap_or(0));
    put_number(&mut trainer, 41, id(description.bos));
    put_number(&mut trainer, 42, id(description.eos));
    put_number(&mut trainer, 43, u64::MAX);
    put_bytes(&mut model, 2, &trainer);
    let mut normalizer = Vec::new();
    put_bytes(
        &mut normalizer,
        1,
        if description.charsmap.is_empty() { b"identity" } else { b"user" },
    );
    put_bytes(&mut normalizer, 2, &description.charsmap);
    put_number(&mut normalizer, 3, u64::from(description.add_dummy_prefix));
    put_number(&mut normalizer, 4, u64::from(description.remove_extra_whitespaces));
    put_number(&mut normalizer, 5, 1);
    put_bytes(&mut model, 3, &normalizer);
    model
}
