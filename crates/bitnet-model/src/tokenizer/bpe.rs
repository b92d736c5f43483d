//! Byte-pair encoding of one word, by tables that need no building: flat bytes, which may lie in a
//! mapped file.
//!
//! The result is that of the `tokenizers` crate (`models/bpe`). Its maps of texts take a large part
//! of a second and a hundred megabytes to build for the 128 256 tokens of Llama 3, which is more
//! than a mapped model takes for its first token. Tables from a file are not trusted: every offset
//! is checked when it is used, and a number that leads nowhere finds nothing.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use bitnet_core::{DType, Tensor};
use bytes::Bytes;

use super::{MAX_VOCABULARY, TokenizerError};

/// Slots looked at before a key counts as absent. With tables at most three quarters full, runs stay
/// far below it; only a vocabulary made for the purpose comes here.
const MOST_PROBES: usize = 1024;

/// How a word is taken apart before and after merging.
#[derive(Debug, Default, Clone, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BpeSettings {
    pub(super) unk_token: Option<String>,
    pub(super) fuse_unk: bool,
    pub(super) byte_fallback: bool,
    /// Whether a whole word that is in the vocabulary is one token, whatever merges would make.
    pub(super) ignore_merges: bool,
}

/// A vocabulary with its merges.
pub(super) struct Bpe {
    pub(super) settings: BpeSettings,
    /// The tokens as the vocabulary spells them, end to end.
    spellings: Bytes,
    /// Open-addressed `[slots]`: start and length in `spellings`, id. Length 0 is an empty slot.
    vocabulary: Slots<3>,
    /// Open-addressed `[slots]`: left id, right id, rank, id of the joined token. [`EMPTY`] on the
    /// left is an empty slot.
    merges: Slots<4>,
}

const EMPTY: u32 = u32::MAX;

impl Bpe {
    /// The tables of a vocabulary. Each merge must be of two tokens whose spellings, joined, are a
    /// third.
    pub(super) fn new(
        settings: BpeSettings,
        vocab: &HashMap<String, u32>,
        merges: &[(String, String)],
    ) -> Result<Self, TokenizerError> {
        let mut words: Vec<(&str, u32)> = vocab.iter().map(|(word, &id)| (&**word, id)).collect();
        words.sort_unstable_by_key(|&(_, id)| id);
        if let Some((_, id)) = words.last().filter(|(_, id)| *id as usize >= MAX_VOCABULARY) {
            return Err(TokenizerError::vocabulary(format!(
                "token id {id} is beyond the limit of {MAX_VOCABULARY}"
            )));
        }
        let mut spellings = Vec::with_capacity(words.iter().map(|(word, _)| word.len()).sum());
        let mut table = Builder::new(words.len(), [0; 3]);
        for &(word, id) in words.iter().filter(|(word, _)| !word.is_empty()) {
            let start = u32::try_from(spellings.len()).ok();
            let (Some(start), Ok(length)) = (start, u32::try_from(word.len())) else {
                return Err(TokenizerError::vocabulary("the vocabulary has more than 4 GB"));
            };
            spellings.extend_from_slice(word.as_bytes());
            // A map has no word twice, so an occupied slot is always another word's.
            table.insert(hash_word(word), [start, length, id], |_| false)?;
        }
        let vocabulary = table.finish();

        let mut table = Builder::new(merges.len(), [EMPTY, 0, 0, 0]);
        let mut joined = String::new();
        for (rank, (left, right)) in (0u32..).zip(merges) {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let id = |part: &String| {
                vocab.get(part).copied().ok_or_else(|| {
                    TokenizerError::vocabulary(format!(
                        "the merge `{left} {right}` needs the token `{part}`, which is not in the \
                         vocabulary"
                    ))
                })
            };
            let (left, right, new) = (id(left)?, id(right)?, id(&joined)?);
            // Of a merge that stands there twice, the last counts.
            table.insert(hash_pair(left, right), [left, right, rank, new], |slot| {
                slot[..2] == [left, right]
            })?;
        }
        Ok(Bpe { settings, spellings: spellings.into(), vocabulary, merges: table.finish() })
    }

    /// From the tables of a file; what lies in them is looked at when it is used.
    pub(super) fn from_tables(
        settings: BpeSettings,
        spellings: &Tensor,
        vocabulary: &Tensor,
        merges: &Tensor,
    ) -> Result<Self, TokenizerError> {
        Ok(Bpe {
            settings,
            spellings: spellings.data().clone(),
            vocabulary: Slots::from_tensor(vocabulary)?,
            merges: Slots::from_tensor(merges)?,
        })
    }

    /// The spellings, the vocabulary and the merges, for [`from_tables`](Self::from_tables).
    pub(super) fn tables(&self) -> [Tensor; 3] {
        [super::byte_tensor(&self.spellings), self.vocabulary.tensor(), self.merges.tensor()]
    }

    /// The id of a token by its spelling.
    pub(super) fn id_of(&self, word: &str) -> Option<u32> {
        if word.is_empty() {
            return None;
        }
        self.vocabulary
            .probe(hash_word(word))
            .take_while(|[_, length, _]| *length != 0)
            .find(|&[start, length, _]| {
                let (start, length) = (start as usize, length as usize);
                self.spellings.get(start..).and_then(|rest| rest.get(..length))
                    == Some(word.as_bytes())
            })
            .map(|[_, _, id]| id)
    }

    /// Every token that has a spelling, by id.
    pub(super) fn words(&self) -> BTreeMap<u32, &str> {
        let word = |[start, length, id]: [u32; 3]| {
            let bytes = self.spellings.get(start as usize..)?.get(..length as usize)?;
            Some((id, std::str::from_utf8(bytes).ok()?)).filter(|(_, word)| !word.is_empty())
        };
        self.vocabulary.all().filter_map(word).collect()
    }

    /// The ids of the two halves of every merge, the first to be made first.
    pub(super) fn ranked_merges(&self) -> Vec<[u32; 2]> {
        let mut merges: Vec<[u32; 4]> =
            self.merges.all().filter(|[left, ..]| *left != EMPTY).collect();
        merges.sort_unstable_by_key(|[_, _, rank, _]| *rank);
        merges.into_iter().map(|[left, right, ..]| [left, right]).collect()
    }

    /// Rank and id of what two neighbours become.
    fn merge(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        self.merges
            .probe(hash_pair(left, right))
            .take_while(|slot| slot[0] != EMPTY)
            .find(|slot| slot[..2] == [left, right])
            .map(|[_, _, rank, id]| (rank, id))
    }

    /// Appends the ids of a word.
    ///
    /// # Errors
    /// The word needs the unknown token, and the vocabulary does not have the one it names.
    pub(super) fn encode(&self, word: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if self.settings.ignore_merges
            && let Some(id) = self.id_of(word)
        {
            ids.push(id);
            return Ok(());
        }
        let mut symbols = self.symbols(word)?;
        self.merge_all(&mut symbols);
        ids.extend(symbols.iter().filter(|symbol| symbol.alive).map(|symbol| symbol.id));
        Ok(())
    }

    /// The tokens of the single characters.
    fn symbols(&self, word: &str) -> Result<Vec<Symbol>, TokenizerError> {
        let BpeSettings { unk_token, fuse_unk, byte_fallback, .. } = &self.settings;
        let mut ids: Vec<u32> = Vec::with_capacity(word.len());
        let mut unknown_before = None;
        let mut utf8 = [0; 4];
        for character in word.chars() {
            let character = character.encode_utf8(&mut utf8);
            if let Some(id) = self.id_of(character) {
                ids.extend(unknown_before.take());
                ids.push(id);
                continue;
            }
            if *byte_fallback {
                let byte = |byte: u8| self.id_of(&format!("<0x{byte:02X}>"));
                let bytes: Option<Vec<u32>> = character.bytes().map(byte).collect();
                if let Some(bytes) = bytes {
                    // Not after an unknown that waits: that is how the `tokenizers` crate has it.
                    ids.extend(bytes);
                    continue;
                }
            }
            let Some(name) = unk_token else { continue };
            if !(*fuse_unk && unknown_before.is_some()) {
                let id = self.id_of(name).ok_or_else(|| {
                    TokenizerError::Text(format!(
                        "`{character}` is not in the vocabulary, nor is the unknown token `{name}`"
                    ))
                })?;
                ids.extend(unknown_before.replace(id));
            }
        }
        ids.extend(unknown_before);
        let last = ids.len().wrapping_sub(1);
        let symbol = |(index, id): (usize, u32)| Symbol {
            id,
            alive: true,
            previous: index.checked_sub(1),
            next: (index != last).then_some(index + 1),
        };
        Ok(ids.into_iter().enumerate().map(symbol).collect())
    }

    /// Joins neighbours, of all that can be joined those of the lowest rank first, of equal ones the
    /// leftmost.
    fn merge_all(&self, symbols: &mut [Symbol]) {
        let mut agenda = BinaryHeap::with_capacity(symbols.len());
        let offer = |symbols: &[Symbol], left: usize, agenda: &mut BinaryHeap<_>| {
            let Some(right) = symbols[left].next else { return };
            if let Some((rank, id)) = self.merge(symbols[left].id, symbols[right].id) {
                agenda.push(Reverse((rank, left, id)));
            }
        };
        for left in 0..symbols.len() {
            offer(symbols, left, &mut agenda);
        }
        while let Some(Reverse((_, left, id))) = agenda.pop() {
            if !symbols[left].alive {
                continue;
            }
            let Some(right) = symbols[left].next else { continue };
            // The pair may have changed since it was noted.
            if self.merge(symbols[left].id, symbols[right].id).is_none_or(|(_, now)| now != id) {
                continue;
            }
            let after = symbols[right].next;
            symbols[right].alive = false;
            symbols[left].id = id;
            symbols[left].next = after;
            if let Some(after) = after {
                symbols[after].previous = Some(left);
            }
            if let Some(before) = symbols[left].previous {
                offer(symbols, before, &mut agenda);
            }
            offer(symbols, left, &mut agenda);
        }
    }
}

/// A part of a word on its way to a token.
struct Symbol {
    id: u32,
    /// Whether it has not become a part of its left neighbour.
    alive: bool,
    previous: Option<usize>,
    next: Option<usize>,
}

/// A hash table of little-endian numbers, a power of two of slots long or empty.
struct Slots<const N: usize>(Bytes);

impl<const N: usize> Slots<N> {
    fn from_tensor(tensor: &Tensor) -> Result<Self, TokenizerError> {
        let [slots, width] = *tensor.shape() else {
            return Err(TokenizerError::vocabulary("a table of the vocabulary has no rows"));
        };
        if tensor.dtype() != DType::I32 || width != N || !(slots == 0 || slots.is_power_of_two()) {
            return Err(TokenizerError::vocabulary(format!(
                "a table of the vocabulary is {} {:?}: I32 with a power of two rows of {N} is \
                 needed",
                tensor.dtype(),
                tensor.shape()
            )));
        }
        Ok(Slots(tensor.data().clone()))
    }

    fn tensor(&self) -> Tensor {
        Tensor::new(DType::I32, vec![self.0.len() / (4 * N), N], self.0.clone())
            .expect("slots are whole rows")
    }

    /// Every slot, empty ones too.
    fn all(&self) -> impl Iterator<Item = [u32; N]> {
        let (numbers, _) = self.0.as_chunks::<4>();
        let slots = numbers.chunks_exact(N);
        slots.map(|slot| std::array::from_fn(|i| u32::from_le_bytes(slot[i])))
    }

    /// The slots where a key may be, in order.
    fn probe(&self, hash: u64) -> impl Iterator<Item = [u32; N]> {
        let (numbers, _) = self.0.as_chunks::<4>();
        let slots = numbers.len() / N;
        (0..slots.min(MOST_PROBES)).map(move |step| {
            let slot = (hash as usize).wrapping_add(step) & (slots - 1);
            std::array::from_fn(|i| u32::from_le_bytes(numbers[slot * N + i]))
        })
    }
}

/// A hash table being filled.
struct Builder<const N: usize> {
    empty: [u32; N],
    slots: Vec<[u32; N]>,
}

impl<const N: usize> Builder<N> {
    fn new(entries: usize, empty: [u32; N]) -> Self {
        let slots = if entries == 0 { 0 } else { (entries + entries / 3 + 1).next_power_of_two() };
        Builder { empty, slots: vec![empty; slots] }
    }

    /// Puts an entry into the first free slot, or into one that `same` says is its own.
    fn insert(
        &mut self,
        hash: u64,
        entry: [u32; N],
        same: impl Fn(&[u32; N]) -> bool,
    ) -> Result<(), TokenizerError> {
        let mask = self.slots.len() - 1;
        let free = (0..self.slots.len().min(MOST_PROBES))
            .map(|step| (hash as usize).wrapping_add(step) & mask)
            .find(|&slot| self.slots[slot] == self.empty || same(&self.slots[slot]));
        let Some(slot) = free else {
            return Err(TokenizerError::vocabulary(
                "the vocabulary cannot be used: too many of its entries look alike",
            ));
        };
        self.slots[slot] = entry;
        Ok(())
    }

    fn finish(self) -> Slots<N> {
        let numbers = self.slots.iter().flatten();
        Slots(numbers.flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>().into())
    }
}

/// FNV-1a (Fowler, Noll, Vo), its upper half folded in. It is a part of the file format.
fn hash_word(word: &str) -> u64 {
    let hash = word.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash ^ hash >> 32
}

/// The finaliser of SplitMix64 (Steele et al. 2014). It is a part of the file format.
fn hash_pair(left: u32, right: u32) -> u64 {
    let z = u64::from(left) << 32 | u64::from(right);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::Model;
    use tokenizers::models::bpe::BPE;

    /// The same vocabulary here and in the `tokenizers` crate.
    fn both(settings: &BpeSettings) -> (Bpe, BPE) {
        let mut words: Vec<String> = "abcdé".chars().map(String::from).collect();
        words.extend((0u8..=255).map(|byte| format!("<0x{byte:02X}>")));
        words.push("<unk>".into());
        let merges: Vec<(String, String)> =
            [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "a"), ("aa", "aa"), ("é", "a")]
                .iter()
                .map(|(left, right)| (left.to_string(), right.to_string()))
                .collect();
        words.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
        words.push("dcba".into());
        if !settings.byte_fallback {
            words.retain(|word| !word.starts_with("<0x"));
        }
        let vocab: HashMap<String, u32> = words.into_iter().zip(0..).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(
                vocab.clone().into_iter().collect::<tokenizers::models::bpe::Vocab>(),
                merges.clone(),
            )
            .fuse_unk(settings.fuse_unk)
            .byte_fallback(settings.byte_fallback)
            .ignore_merges(settings.ignore_merges);
        if let Some(unk) = &settings.unk_token {
            builder = builder.unk_token(unk.clone());
        }
        (Bpe::new(settings.clone(), &vocab, &merges).unwrap(), builder.build().unwrap())
    }

    proptest! {
        #[test]
        fn words_become_the_tokens_that_hugging_face_makes(
            word in "[abcdéxy]{1,24}", bits in 0u8..16
        ) {
            let settings = BpeSettings {
                unk_token: (bits & 1 != 0).then(|| "<unk>".to_owned()),
                fuse_unk: bits & 2 != 0,
                byte_fallback: bits & 4 != 0,
                ignore_merges: bits & 8 != 0,
            };
            let (ours, theirs) = both(&settings);
            let mut ids = Vec::new();
            ours.encode(&word, &mut ids).unwrap();
            let expected: Vec<u32> =
                theirs.tokenize(&word).unwrap().iter().map(|token| token.id).collect();
            prop_assert_eq!(ids, expected);
        }
    }

    #[test]
    fn broken_tables_find_nothing() {
        let (ours, _) = both(&BpeSettings::default());
        let [_, vocabulary, merges] = ours.tables();
        let nothing = Tensor::new(DType::U8, vec![0], Bytes::new()).unwrap();
        let broken = Bpe::from_tables(BpeSettings::default(), &nothing, &vocabulary, &merges);
        let mut ids = Vec::new();
        broken.unwrap().encode("abc", &mut ids).unwrap();
        assert!(ids.is_empty(), "{ids:?}");
        assert!(Bpe::from_tables(BpeSettings::default(), &nothing, &merges, &merges).is_err());
    }
}
