//! What the times of acknowledgements say about how long writes stood still. All times are of one clock and one unit, in order.

/// The longest time between two acknowledgements of which the later comes after `from`; also from the last one to `until`, if none came after it.
pub fn longest_gap(acks: &[u64], from: u64, until: u64) -> u64 {
    let first = acks.partition_point(|at| *at <= from);
    // The one before the fault begins the first gap.
    let begins = first.checked_sub(1).map_or(from, |index| acks[index]);
    let ends = acks[first..].iter().copied().chain([until]);
    let mut last = begins;
    let mut longest = 0;
    for at in ends {
        longest = longest.max(at.saturating_sub(last));
        last = at;
    }
    longest
}

/// Whether acknowledgements have come without a pause of `still` or longer since `since`, before which there was one already.
pub fn is_steady(acks: &[u64], since: u64, now: u64, still: u64) -> bool {
    longest_gap(acks, since, now) < still && acks.first().is_some_and(|first| *first < since)
}

/// By nearest rank; 0 if there are none.
pub fn quantile(values: &[u64], quantile: f64) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (quantile * sorted.len() as f64).ceil() as usize;
    let index = rank.saturating_sub(1);
    sorted.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_the_one_that_the_fault_made() {
        let cases: [(&[u64], u64, u64, u64); 6] = [
            (&[10, 20, 30, 90, 100], 35, 105, 60),
            // The one before the fault does not count, however long it was.
            (&[10, 80, 90, 100, 110], 95, 112, 10),
            // It may come some time after the fault.
            (&[10, 20, 30, 40, 70, 80], 15, 85, 30),
            (&[10, 20], 25, 100, 80),
            (&[], 25, 100, 75),
            (&[30, 40], 25, 41, 10),
        ];
        for (acks, from, until, expected) in cases {
            assert_eq!(longest_gap(acks, from, until), expected, "{acks:?}");
        }
    }

    #[test]
    fn writes_are_steady_only_after_they_have_gone_on_for_the_whole_time() {
        let every = |from: u64, until: u64| (from..until).step_by(10).collect::<Vec<_>>();
        let is_steady = |acks: &[u64]| is_steady(acks, 300, 500, 50);
        assert!(is_steady(&every(0, 500)));
        assert!(!is_steady(&every(0, 400)));
        assert!(!is_steady(&every(400, 500)));
        let with_pause = [every(0, 300), every(400, 500)].concat();
        assert!(!is_steady(&with_pause));
        assert!(!is_steady(&[]));
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<u64> = (1..=30).rev().collect();
        assert_eq!([0.5, 0.99, 1.0].map(|q| quantile(&values, q)), [15, 30, 30]);
        assert_eq!(quantile(&[], 0.5), 0);
    }
}
