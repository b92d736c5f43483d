//! Prompt lookup: what came after the last tokens when they came before (Saxena 2023, "Prompt lookup
//! decoding"; the same idea as llama.cpp's and Hugging Face's).

/// Most last tokens that are compared. More of them hardly tell places apart.
const LONGEST: usize = 4;

/// Fewest last tokens that must be the same. Two come again too often to mean much.
const SHORTEST: usize = 3;

/// The place of the token that followed when the last tokens came before: of those places where the
/// most are the same, the latest.
pub(super) fn continuation(tokens: &[u32]) -> Option<usize> {
    let (mut best, mut place) = (SHORTEST - 1, None);
    for end in (1..tokens.len()).rev() {
        let earlier = tokens[..end].iter().rev();
        let pairs = earlier.zip(tokens.iter().rev()).take(LONGEST);
        let same = pairs.take_while(|(a, b)| a == b).count();
        if same > best {
            (best, place) = (same, Some(end));
            if same == LONGEST {
                break;
            }
        }
    }
    place
}

#[cfg(test)]
mod tests {
    use bitnet_testing::Random;

    use super::*;

    /// The same by its definition: the longest number of tokens first, for each the latest place.
    fn by_definition(tokens: &[u32]) -> Option<usize> {
        (SHORTEST..=LONGEST.min(tokens.len())).rev().find_map(|n| {
            let last = &tokens[tokens.len() - n..];
            let earlier = tokens[..tokens.len() - 1].windows(n);
            earlier.rev().position(|window| window == last).map(|back| tokens.len() - 1 - back)
        })
    }

    #[test]
    fn the_latest_of_the_longest_repetitions_is_found() {
        assert_eq!(continuation(&[1, 2, 3, 4, 9, 2, 3, 4]), Some(4));
        // Three of the same came twice before, of which the second is taken.
        assert_eq!(continuation(&[1, 2, 3, 0, 1, 2, 3, 9, 1, 2, 3]), Some(7));
        // Four of the same are better than three that came later.
        assert_eq!(continuation(&[8, 1, 2, 3, 0, 1, 2, 3, 8, 1, 2, 3]), Some(4));
        assert_eq!(continuation(&[5, 5, 5, 5]), Some(3));
        for nothing in [&[][..], &[1], &[1, 1, 1], &[1, 2, 3], &[2, 3, 1, 2, 3]] {
            assert_eq!(continuation(nothing), None, "{nothing:?}");
        }
        let random = &mut Random::new(5);
        let mut found = 0;
        for _ in 0..5_000 {
            let (length, ids) = (random.below(40), 1 + random.below(4));
            let tokens: Vec<u32> = (0..length).map(|_| random.below(ids) as u32).collect();
            assert_eq!(continuation(&tokens), by_definition(&tokens), "{tokens:?}");
            found += usize::from(continuation(&tokens).is_some());
        }
        assert!((1_000..4_500).contains(&found), "{found}");
    }
}
