//! Stop strings: ending a stream of text before any of several strings, wherever the chunks of the
//! stream are cut.
//!
//! Text that could be the beginning of a stop string is held back until it is clear; everything
//! else is released at once. The match that begins first wins. Where two begin at the same place
//! the shorter one is reported: it is complete first, and the text before it is the same.

use thiserror::Error;

/// An empty stop string, which would match everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("stop string {index} is empty; give at least one character or leave it out")]
pub struct EmptyStopString {
    /// Its place in the list, from 0.
    pub index: usize,
}

/// Looks for stop strings in text that arrives in chunks.
///
/// The pieces released by [`push`](StopStrings::push) and [`finish`](StopStrings::finish), joined,
/// are the whole text up to the first match, or all of it without one; this does not depend on
/// how the text was cut into chunks. A few characters may be needed beyond a match: with the stop
/// strings `abcd` and `bc`, text `abc` is decided by what follows.
#[derive(Debug, Clone)]
pub struct StopStrings {
    /// Shortest first, so that the first to match at a place is the one to report.
    stops: Vec<String>,
    /// Text not yet released: empty, or a proper beginning of some stop string.
    held: String,
    matched: Option<usize>,
}

impl StopStrings {
    /// A matcher at the beginning of a text. Without stop strings it passes all text through.
    ///
    /// # Errors
    /// If one of the stop strings is empty.
    pub fn new(stops: Vec<String>) -> Result<Self, EmptyStopString> {
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(EmptyStopString { index });
        }
        let mut stops = stops;
        stops.sort_by_key(String::len);
        Ok(Self { stops, held: String::new(), matched: None })
    }

    /// Takes the next chunk and returns the text that is now certain to lie before any match. After
    /// a match, further text is dropped.
    pub fn push(&mut self, chunk: &str) -> String {
        self.held.push_str(chunk);
        self.release(true)
    }

    /// Ends the text: returns what was held back, up to a match if one is complete in it.
    pub fn finish(&mut self) -> String {
        self.release(false)
    }

    /// The stop string that ended the text.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|index| self.stops[index].as_str())
    }

    /// Releases held text up to the first place where a stop string matches or, with `more` text
    /// to come, could still match. Stop strings are whole characters, so that only the beginnings
    /// of characters need a look.
    fn release(&mut self, more: bool) -> String {
        if self.matched.is_some() {
            self.held.clear();
            return String::new();
        }
        let mut clear = self.held.len();
        for (start, _) in self.held.char_indices() {
            let rest = &self.held[start..];
            self.matched = self.stops.iter().position(|stop| rest.starts_with(stop.as_str()));
            if self.matched.is_some() {
                let text = self.held[..start].to_string();
                self.held.clear();
                return text;
            }
            if more && self.stops.iter().any(|stop| stop.starts_with(rest)) {
                clear = start;
                break;
            }
        }
        let rest = self.held.split_off(clear);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&str]) -> StopStrings {
        StopStrings::new(stops.iter().map(|s| s.to_string()).collect()).unwrap()
    }

    /// The obvious search in the whole text: first place, then shortest.
    fn search<'a>(text: &'a str, stops: &[String]) -> (&'a str, Option<String>) {
        let first = stops
            .iter()
            .filter_map(|stop| text.find(stop.as_str()).map(|start| (start, stop.len(), stop)))
            .min();
        match first {
            Some((start, _, stop)) => (&text[..start], Some(stop.clone())),
            None => (text, None),
        }
    }

    #[test]
    fn a_stop_string_is_found_across_chunks_and_cut_off() {
        let mut stops = matcher(&["<|end|>"]);
        assert_eq!(stops.push("Hello <"), "Hello ");
        assert_eq!(stops.push("|en"), "");
        assert_eq!(stops.push("d|> and more"), "");
        assert_eq!(stops.matched(), Some("<|end|>"));
        assert_eq!(stops.push("dropped"), "");
        assert_eq!(stops.finish(), "");
    }

    #[test]
    fn text_that_only_looked_like_a_stop_string_is_released() {
        let mut stops = matcher(&["<|end|>"]);
        assert_eq!(stops.push("a <"), "a ");
        assert_eq!(stops.push("b"), "<b");
        assert_eq!(stops.push("<|en<|e"), "<|en");
        assert_eq!(stops.finish(), "<|e");
        assert_eq!(stops.matched(), None);
    }

    #[test]
    fn the_match_that_begins_first_wins_even_if_it_ends_last() {
        let mut stops = matcher(&["bc", "abcd"]);
        assert_eq!(stops.push("xabc"), "x");
        assert_eq!(stops.push("d"), "");
        assert_eq!(stops.matched(), Some("abcd"));

        let mut stops = matcher(&["bc", "abcd"]);
        assert_eq!(stops.push("xabc"), "x");
        assert_eq!(stops.push("e"), "a");
        assert_eq!(stops.matched(), Some("bc"));

        let mut stops = matcher(&["bc", "abcd"]);
        assert_eq!(stops.push("xabc") + &stops.finish(), "xa");
        assert_eq!(stops.matched(), Some("bc"));
    }

    #[test]
    fn without_stop_strings_all_text_passes_at_once() {
        let mut stops = matcher(&[]);
        assert_eq!(stops.push("größe"), "größe");
        assert_eq!(stops.finish(), "");
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopStrings::new(vec!["a".into(), String::new()]).unwrap_err();
        assert_eq!(error, EmptyStopString { index: 1 });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn chunks_give_what_a_search_of_the_whole_text_gives(
            text in "[abé🙂]{0,24}",
            stops in prop::collection::vec("[abé🙂]{1,5}", 0..4),
            sizes in prop::collection::vec(1usize..6, 1..12),
        ) {
            let characters: Vec<char> = text.chars().collect();
            let mut matcher = StopStrings::new(stops.clone()).unwrap();
            let (mut out, mut rest, mut sizes) = (String::new(), &characters[..], sizes.iter().cycle());
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                out += &matcher.push(&chunk.iter().collect::<String>());
                // What is held back is never more than a stop string could need.
                prop_assert!(stops.iter().any(|s| s.starts_with(&matcher.held)) || matcher.held.is_empty());
                rest = after;
            }
            out += &matcher.finish();
            let (expected, stop) = search(&text, &stops);
            prop_assert_eq!(out, expected);
            prop_assert_eq!(matcher.matched(), stop.as_deref());
        }
    }
}
