//! Where a decoder is cut when its layers are spread over several devices.

use std::ops::Range;

/// Cuts layers, of so many bytes each, into consecutive stages of at least one layer, such that the
/// largest stage holds as few bytes as can be. The first stage has `first` bytes besides its
/// layers, the last one `last`.
///
/// # Panics
/// If there are no stages, or more of them than layers.
pub(crate) fn cut(layers: &[u64], first: u64, last: u64, stages: usize) -> Vec<Range<usize>> {
    assert!((1..=layers.len()).contains(&stages), "{stages} stages of {} layers", layers.len());
    let all = layers.iter().fold(first.saturating_add(last), |sum, &n| sum.saturating_add(n));
    let (mut too_little, mut enough) = (0, all);
    while too_little + 1 < enough {
        let limit = too_little + (enough - too_little) / 2;
        match fill(layers, first, last, stages, limit).1 <= limit {
            true => enough = limit,
            false => too_little = limit,
        }
    }
    fill(layers, first, last, stages, enough).0
}

/// Stages that are filled one after another, each until one more layer would make it larger than
/// `limit` or leave too few for the others, and the bytes of the largest. If any stages stay within
/// the limit, these do: no others have the rest begin later.
fn fill(
    layers: &[u64],
    first: u64,
    last: u64,
    stages: usize,
    limit: u64,
) -> (Vec<Range<usize>>, u64) {
    let mut ranges = Vec::with_capacity(stages);
    let (mut start, mut largest) = (0, 0);
    for stage in 0..stages {
        let others = stages - stage - 1;
        let mut bytes = if stage == 0 { first } else { 0 };
        if others == 0 {
            bytes = bytes.saturating_add(last);
        }
        let mut end = start;
        while end + others < layers.len() {
            let more = bytes.saturating_add(layers[end]);
            if others > 0 && end > start && more > limit {
                break;
            }
            bytes = more;
            end += 1;
        }
        largest = largest.max(bytes);
        ranges.push(start..end);
        start = end;
    }
    (ranges, largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The least size of the largest stage, by trying every cut.
    fn least(layers: &[u64], first: u64, last: u64, stages: usize) -> u64 {
        if stages == 1 {
            return first + layers.iter().sum::<u64>() + last;
        }
        (1..=layers.len() - (stages - 1))
            .map(|end| {
                let bytes = first + layers[..end].iter().sum::<u64>();
                bytes.max(least(&layers[end..], 0, last, stages - 1))
            })
            .min()
            .expect("there is a cut")
    }

    #[test]
    fn no_other_cut_has_a_smaller_largest_stage() {
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..500 {
            let layers: Vec<u64> = (0..1 + random(8)).map(|_| random(30)).collect();
            let (first, last) = (random(60), random(60));
            let stages = 1 + random(layers.len() as u64) as usize;
            let ranges = cut(&layers, first, last, stages);
            assert_eq!(ranges.len(), stages);
            assert_eq!((ranges[0].start, ranges[stages - 1].end), (0, layers.len()));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(ranges.iter().all(|range| !range.is_empty()));
            let bytes = |(stage, range): (usize, &Range<usize>)| {
                let ends = [(stage == 0, first), (stage + 1 == stages, last)];
                let ends = ends.iter().filter(|(here, _)| *here).map(|(_, bytes)| bytes);
                layers[range.clone()].iter().chain(ends).sum::<u64>()
            };
            let largest = ranges.iter().enumerate().map(bytes).max().unwrap();
            assert_eq!(largest, least(&layers, first, last, stages), "{layers:?} {ranges:?}");
        }
    }

    #[test]
    fn equal_layers_are_shared_evenly_and_large_tables_take_the_place_of_layers() {
        assert_eq!(cut(&[5; 6], 0, 0, 3), [0..2, 2..4, 4..6]);
        assert_eq!(cut(&[5; 6], 10, 20, 2), [0..4, 4..6]);
        assert_eq!(cut(&[5; 3], 100, 100, 3), [0..1, 1..2, 2..3]);
    }
}
