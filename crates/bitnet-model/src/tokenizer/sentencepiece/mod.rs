//! SentencePiece's rules: normalise, then BPE by score or the best unigram path.
//!
//! Mirrors google/sentencepiece (`normalizer.cc`, `bpe_model.cc`, `unigram_model.cc`), ties included:
//! among equal scores BPE merges the leftmost pair, and a unigram path is replaced only by a better
//! one. Byte-pair merges derived from the scores, as converters make them, break some of these ties
//! otherwise.

mod charsmap;
mod model_file;
pub(super) use self::model_file::write as write_model;

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use serde::{Deserialize, Serialize};
use tokenizers::AddedToken;

use self::charsmap::CharsMap;
use super::json::byte_of_name;
use super::{LeadingSpace, Parts, Segmentation, Tokenizer, TokenizerConfig, TokenizerError};

/// How SentencePiece writes a space.
const SPACE: &str = "▁";
/// What a character without a piece costs below the least likely piece (`kUnkPenalty`).
const UNKNOWN_PENALTY: f32 = 10.0;

/// What a piece is for, with SentencePiece's and GGUF's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    pub(super) fn number(self) -> i64 {
        self as i64 + 1
    }

    pub(super) fn from_number(number: i64) -> Option<Self> {
        use Kind::*;
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        [Normal, Unknown, Control, UserDefined, Unused, Byte].get(index).copied()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) score: f32,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Algorithm {
    Bpe,
    Unigram,
}

/// A SentencePiece model as its file describes it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    pub(super) pieces: Vec<Piece>,
    pub(super) algorithm: Algorithm,
    pub(super) byte_fallback: bool,
    pub(super) add_dummy_prefix: bool,
    pub(super) remove_extra_whitespaces: bool,
    /// Whether text after a special token gets a first space like text that begins.
    pub(super) prefix_every_fragment: bool,
    pub(super) charsmap: Vec<u8>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
}

/// Encodes text between special tokens.
pub(super) struct SentencePiece {
    description: Description,
    charsmap: Option<CharsMap>,
    /// Every piece by its text.
    ids: HashMap<String, u32>,
    /// The pieces that text can match.
    matchable: PrefixTable,
    user_defined: PrefixTable,
    unknown: Option<u32>,
    /// The piece of each byte; empty without byte fallback.
    byte_ids: Vec<u32>,
    longest: usize,
    /// Score of a character that no piece covers.
    unknown_score: f32,
    best_score: f32,
}

impl Tokenizer {
    /// From the bytes of a SentencePiece `tokenizer.model`, with what `tokenizer_config.json` adds to
    /// it. As Hugging Face's Llama tokenizer does, texts begin with the begin token unless the
    /// configuration says otherwise.
    ///
    /// # Errors
    /// A sentence about what is broken in the file or is not supported.
    pub fn from_sentencepiece(
        bytes: &[u8],
        config: &TokenizerConfig,
    ) -> Result<Self, TokenizerError> {
        let mut description = model_file::read(bytes)?;
        description.prefix_every_fragment = config.legacy.unwrap_or(true);
        let id_of = |name: &String| {
            let in_config = config.added_tokens.iter().find(|(_, token)| token.content == *name);
            let in_model = || description.pieces.iter().position(|piece| piece.text == *name);
            in_config
                .map(|(id, _)| *id)
                .or_else(|| in_model().map(|index| index as u32))
                .ok_or_else(|| TokenizerError::vocabulary(format!("the token `{name}` has no id")))
        };
        let bos = config.bos_token.as_ref().map(id_of).transpose()?.or(description.bos);
        let eos = config.eos_token.as_ref().map(id_of).transpose()?.or(description.eos);
        let prefix = bos.filter(|_| config.add_bos.unwrap_or(true));
        let suffix = eos.filter(|_| config.add_eos.unwrap_or(false));
        let added = config.added_tokens.iter().map(|(id, token)| (*id, token.clone())).collect();
        tokenizer(description, bos, eos, prefix, suffix, added)
    }
}

/// A tokenizer by SentencePiece's rules.
pub(super) fn tokenizer(
    description: Description,
    bos: Option<u32>,
    eos: Option<u32>,
    prefix: Option<u32>,
    suffix: Option<u32>,
    mut added: Vec<(u32, AddedToken)>,
) -> Result<Tokenizer, TokenizerError> {
    for (id, token) in &added {
        let piece = description.pieces.get(*id as usize);
        if let Some(piece) = piece.filter(|piece| piece.text != token.content) {
            return Err(TokenizerError::vocabulary(format!(
                "token {id} is `{}` in the configuration and `{}` in the vocabulary",
                token.content, piece.text
            )));
        }
    }
    let mut bytes = HashMap::with_capacity(description.pieces.len());
    for (id, piece) in (0u32..).zip(&description.pieces) {
        let spelled = match piece.kind {
            Kind::Byte => byte_of_name(&piece.text).map(|byte| vec![byte]),
            Kind::Control | Kind::Unknown => {
                added.push((id, AddedToken::from(piece.text.clone(), true)));
                continue;
            }
            Kind::Normal | Kind::UserDefined | Kind::Unused => None,
        };
        bytes.insert(id, spelled.unwrap_or_else(|| piece.text.replace(SPACE, " ").into_bytes()));
    }
    let leading_space = match (description.remove_extra_whitespaces, description.add_dummy_prefix) {
        (true, _) => LeadingSpace::DroppedUntilText,
        (false, true) => LeadingSpace::Dropped,
        (false, false) => LeadingSpace::Kept,
    };
    Tokenizer::new(Parts {
        segmentation: Segmentation::SentencePiece(Box::new(SentencePiece::new(description)?)),
        added,
        bytes,
        prefix: prefix.into_iter().collect(),
        suffix: suffix.into_iter().collect(),
        bos,
        eos,
        leading_space,
    })
}

impl SentencePiece {
    pub(super) fn new(description: Description) -> Result<Self, TokenizerError> {
        let mut ids = HashMap::with_capacity(description.pieces.len());
        let mut byte_ids = vec![None; 256];
        let mut unknown = None;
        let (mut worst_score, mut best_score) = (f32::MAX, f32::MIN_POSITIVE);
        for (id, piece) in (0u32..).zip(&description.pieces) {
            if piece.text.is_empty() || !piece.score.is_finite() {
                return Err(TokenizerError::vocabulary(format!(
                    "piece {id} of the vocabulary is empty or has no finite score"
                )));
            }
            if ids.insert(piece.text.clone(), id).is_some() {
                return Err(TokenizerError::vocabulary(format!(
                    "the piece `{}` is in the vocabulary twice",
                    piece.text
                )));
            }
            match piece.kind {
                Kind::Unknown => unknown = Some(id),
                Kind::Byte => {
                    if let Some(byte) = byte_of_name(&piece.text) {
                        byte_ids[byte as usize] = Some(id);
                    }
                }
                Kind::Normal => {
                    worst_score = worst_score.min(piece.score);
                    best_score = best_score.max(piece.score);
                }
                Kind::Control | Kind::UserDefined | Kind::Unused => {}
            }
        }
        let byte_ids = if description.byte_fallback {
            byte_ids.into_iter().collect::<Option<Vec<u32>>>().ok_or_else(|| {
                TokenizerError::vocabulary(
                    "the vocabulary falls back to bytes and does not have all 256 of them",
                )
            })?
        } else {
            Vec::new()
        };
        let charsmap = match description.charsmap.as_slice() {
            [] => None,
            bytes => Some(CharsMap::read(bytes)?),
        };
        let table = |kinds: &[Kind]| {
            let pieces = (0u32..).zip(&description.pieces);
            let chosen = pieces.filter(|(_, piece)| kinds.contains(&piece.kind));
            PrefixTable::new(chosen.map(|(id, piece)| (piece.text.clone(), id)).collect())
        };
        Ok(SentencePiece {
            matchable: table(&[Kind::Normal, Kind::UserDefined, Kind::Unused]),
            user_defined: table(&[Kind::UserDefined]),
            longest: description.pieces.iter().map(|piece| piece.text.len()).max().unwrap_or(0),
            unknown_score: worst_score - UNKNOWN_PENALTY,
            description,
            charsmap,
            ids,
            unknown,
            byte_ids,
            best_score,
        })
    }

    /// What [`new`](Self::new) made it of.
    pub(super) fn description(&self) -> &Description {
        &self.description
    }

    pub(super) fn id_of(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// Appends the ids of a text between special tokens. `begins`: nothing stands before it.
    pub(super) fn encode(
        &self,
        text: &str,
        begins: bool,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let prefix =
            self.description.add_dummy_prefix && (begins || self.description.prefix_every_fragment);
        let normalized = self.normalize(text, prefix)?;
        let segments = match self.description.algorithm {
            Algorithm::Bpe => self.merge(&normalized),
            Algorithm::Unigram => self.best_path(&normalized),
        };
        let mut after_unknown = false;
        for (segment, id) in segments {
            let is_unknown = id.is_none() || id == self.unknown;
            if let Some(id) = id.filter(|_| !is_unknown) {
                ids.push(id);
            } else if !self.byte_ids.is_empty() {
                ids.extend(segment.bytes().map(|byte| self.byte_ids[byte as usize]));
            } else if !after_unknown {
                // A run of unknown characters is one unknown token.
                let unknown = self.unknown.ok_or_else(|| {
                    TokenizerError::Text(format!(
                        "`{segment}` is not in the vocabulary, which has no token for the unknown"
                    ))
                })?;
                ids.push(unknown);
            }
            after_unknown = is_unknown;
        }
        Ok(())
    }

    /// `Normalizer::Normalize`: rewrite by the character map, collapse spaces if asked to, put a
    /// space first if asked to, write spaces as `▁`.
    fn normalize(&self, text: &str, prefix: bool) -> Result<String, TokenizerError> {
        let collapse = self.description.remove_extra_whitespaces;
        let mut normalized = String::with_capacity(text.len() + text.len() / 2 + SPACE.len());
        let mut after_space = collapse;
        let mut begun = false;
        let mut rest = text;
        while let Some(character) = rest.chars().next() {
            let (mut rewritten, length) = match self.user_defined.longest(rest.as_bytes()) {
                Some((length, _)) => (&rest[..length], length),
                None => {
                    let same = (&rest[..character.len_utf8()], character.len_utf8());
                    let mapped = self.charsmap.as_ref().map(|map| map.longest(rest)).transpose()?;
                    mapped.flatten().unwrap_or(same)
                }
            };
            rest = &rest[length..];
            let leading_space = collapse && rewritten == " ";
            if !begun && !leading_space {
                begun = true;
                normalized.push_str(if prefix { SPACE } else { "" });
            }
            if after_space {
                rewritten = rewritten.trim_start_matches(' ');
            }
            if rewritten.is_empty() {
                continue;
            }
            for (index, part) in rewritten.split(' ').enumerate() {
                if index > 0 {
                    normalized.push_str(SPACE);
                }
                normalized.push_str(part);
            }
            after_space = collapse && rewritten.ends_with(' ');
        }
        if collapse {
            normalized.truncate(normalized.trim_end_matches(SPACE).len());
        }
        Ok(normalized)
    }

    /// BPE by score (`bpe::Model::SampleEncode` without sampling): of all neighbours whose texts
    /// joined are a piece, the pair with the best-scored piece becomes one, until none is left.
    fn merge<'t>(&self, text: &'t str) -> Vec<(&'t str, Option<u32>)> {
        let mut symbols = self.symbols(text);
        let mut agenda = BinaryHeap::new();
        // Of what an unused piece was made, to take it apart again.
        let mut made_of: HashMap<&str, usize> = HashMap::new();
        let mut offer = |symbols: &[Symbol],
                         left: usize,
                         right: usize,
                         agenda: &mut BinaryHeap<Candidate>| {
            let (a, b) = (&symbols[left], &symbols[right]);
            if a.frozen || b.frozen || b.end - a.start > self.longest {
                return;
            }
            let joined = &text[a.start..b.end];
            let Some(id) = self.id_of(joined) else { return };
            let piece = &self.description.pieces[id as usize];
            match piece.kind {
                Kind::Normal | Kind::UserDefined => {}
                Kind::Unused => {
                    made_of.insert(joined, a.end - a.start);
                }
                Kind::Unknown | Kind::Control | Kind::Byte => return,
            }
            // Adding zero makes -0 and 0 the same for the total order.
            agenda.push(Candidate { score: piece.score + 0.0, left, right, length: joined.len() });
        };
        for right in 1..symbols.len() {
            offer(&symbols, right - 1, right, &mut agenda);
        }
        while let Some(Candidate { left, right, length, .. }) = agenda.pop() {
            let (a, b) = (&symbols[left], &symbols[right]);
            // One of the two was merged with something else meanwhile.
            if a.is_gone() || b.is_gone() || b.end - a.start != length {
                continue;
            }
            let (end, next) = (b.end, b.next);
            symbols[left].end = end;
            symbols[left].next = next;
            symbols[right].end = symbols[right].start;
            if let Some(next) = next {
                symbols[next].previous = Some(left);
                offer(&symbols, left, next, &mut agenda);
            }
            if let Some(previous) = symbols[left].previous {
                offer(&symbols, previous, left, &mut agenda);
            }
        }

        let mut segments = Vec::new();
        let mut apart = Vec::new();
        for symbol in symbols.iter().filter(|symbol| !symbol.is_gone()) {
            apart.push(&text[symbol.start..symbol.end]);
            while let Some(segment) = apart.pop() {
                let id = self.id_of(segment);
                let unused =
                    id.is_some_and(|id| self.description.pieces[id as usize].kind == Kind::Unused);
                match made_of.get(segment) {
                    Some(&middle) if unused => {
                        apart.push(&segment[middle..]);
                        apart.push(&segment[..middle]);
                    }
                    _ => segments.push((segment, id)),
                }
            }
        }
        segments
    }

    /// Characters, and user-defined pieces as they stand.
    fn symbols(&self, text: &str) -> Vec<Symbol> {
        let mut symbols = Vec::with_capacity(text.len());
        let mut start = 0;
        while let Some(character) = text[start..].chars().next() {
            let piece = self.user_defined.longest(&text.as_bytes()[start..]);
            let end = start + piece.map_or(character.len_utf8(), |(length, _)| length);
            let index = symbols.len();
            symbols.push(Symbol {
                start,
                end,
                previous: index.checked_sub(1),
                next: (end < text.len()).then_some(index + 1),
                frozen: piece.is_some(),
            });
            start = end;
        }
        symbols
    }

    /// The most likely split into pieces (`unigram::Model::EncodeOptimized`).
    fn best_path<'t>(&self, text: &'t str) -> Vec<(&'t str, Option<u32>)> {
        #[derive(Clone, Copy)]
        struct Node {
            start: usize,
            id: Option<u32>,
            score: f32,
        }
        // The best way found so far to end at each byte.
        let mut best: Vec<Option<Node>> = vec![None; text.len() + 1];
        for (start, character) in text.char_indices() {
            let so_far = best[start].map_or(0.0, |node| node.score);
            let width = character.len_utf8();
            let mut improve = |length: usize, id: Option<u32>, score: f32| {
                let score = score + so_far;
                let target = &mut best[start + length];
                if target.is_none_or(|node| score > node.score) {
                    *target = Some(Node { start, id, score });
                }
            };
            let mut covered = false;
            self.matchable.each(&text.as_bytes()[start..], |length, id| {
                let piece = &self.description.pieces[id as usize];
                let score = match piece.kind {
                    Kind::Unused => return,
                    // Better than any other way to cover the same bytes.
                    Kind::UserDefined => length as f32 * self.best_score - 0.1,
                    _ => piece.score,
                };
                improve(length, Some(id), score);
                covered |= length == width;
            });
            if !covered {
                improve(width, None, self.unknown_score);
            }
        }
        let mut segments = Vec::new();
        let mut end = text.len();
        while end > 0 {
            let node = best[end].expect("each character is covered by a piece or as unknown");
            segments.push((&text[node.start..end], node.id));
            end = node.start;
        }
        segments.reverse();
        segments
    }
}

/// A stretch of text in a list linked both ways; an empty one has been merged into another.
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
    /// User-defined: not to be merged.
    frozen: bool,
}

impl Symbol {
    fn is_gone(&self) -> bool {
        self.start == self.end
    }
}

/// Two neighbours that could become one piece.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Ord for Candidate {
    /// The best score is greatest, and among equals the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

/// Texts sorted by their bytes, to find those that a text begins with.
struct PrefixTable(Vec<(String, u32)>);

impl PrefixTable {
    fn new(mut entries: Vec<(String, u32)>) -> Self {
        entries.sort_unstable();
        PrefixTable(entries)
    }

    /// Calls `found` with length and id of every entry that `text` begins with, shortest first.
    fn each(&self, text: &[u8], mut found: impl FnMut(usize, u32)) {
        // The entries that agree with `text` in their first `depth` bytes.
        let mut range = self.0.as_slice();
        for (depth, byte) in text.iter().enumerate() {
            let at = |entry: &(String, u32)| entry.0.as_bytes()[depth];
            let from = range.partition_point(|entry| at(entry) < *byte);
            let to = range.partition_point(|entry| at(entry) <= *byte);
            range = &range[from..to];
            // An entry that ends here sorts before those that go on.
            if let Some(((_, id), longer)) =
                range.split_first().filter(|(entry, _)| entry.0.len() == depth + 1)
            {
                found(depth + 1, *id);
                range = longer;
            }
            if range.is_empty() {
                return;
            }
        }
    }

    fn longest(&self, text: &[u8]) -> Option<(usize, u32)> {
        let mut longest = None;
        self.each(text, |length, id| longest = Some((length, id)));
        longest
    }
}
