//! A run in a few lines.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use millrace_e2e::gaps::quantile;
use millrace_e2e::history::{Event, Outcome, Verdict};

/// Violations that are shown of each kind; the rest is counted.
const SHOWN: usize = 10;

/// A fault is felt from its beginning on; the last acknowledgement may be older by so much, in microseconds.
const BEFORE: u64 = 250_000;

/// How long writes stood still, by kind of fault.
pub(crate) fn faults(events: &[Event]) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "fault",
        "times",
        "longest gap between acknowledgements, p50, ms",
        "max",
    ]);
    for (kind, gaps) in gaps(events) {
        let ms = |q| format!("{:.0}", quantile(&gaps, q) as f64 / 1e3);
        table.add_row([kind.to_owned(), gaps.len().to_string(), ms(0.5), ms(1.0)]);
    }
    table.to_string()
}

/// Of each fault, the longest time that any partition's writes stood still. A gap is that fault's during which it began.
fn gaps(events: &[Event]) -> BTreeMap<&str, Vec<u64>> {
    let mut acks: HashMap<i32, Vec<u64>> = HashMap::new();
    let mut faults: Vec<(u64, &str, u64)> = Vec::new();
    for event in events {
        match event {
            Event::Append {
                partition,
                ended,
                outcome: Outcome::Acked { .. },
                ..
            } => acks.entry(*partition).or_default().push(*ended),
            Event::Fault { kind, from, .. } => faults.push((*from, kind, 0)),
            _ => {}
        }
    }
    faults.sort_unstable();
    for acks in acks.values_mut() {
        acks.sort_unstable();
        for (last, next) in acks.iter().zip(acks.iter().skip(1)) {
            let begun = faults.partition_point(|(from, ..)| *from <= last + BEFORE);
            let fault = begun.checked_sub(1).and_then(|index| faults.get_mut(index));
            if let Some((.., longest)) = fault.filter(|(from, ..)| *from < *next) {
                *longest = (*longest).max(next - last);
            }
        }
    }
    let mut by_kind: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (_, kind, longest) in faults {
        by_kind.entry(kind).or_default().push(longest);
    }
    by_kind
}

/// What was checked, and what was found.
pub(crate) fn verdict(verdict: &Verdict) -> String {
    let counts = &verdict.counts;
    let mut text = format!(
        "{} partitions; {} records acknowledged, {} of unknown outcome ({} of them in the log), {} failed; {} reads\n",
        counts.partitions,
        counts.acked,
        counts.unknown,
        counts.unknown_in_log,
        counts.failed,
        counts.read
    );
    let mut by_kind: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (partition, violation) in &verdict.violations {
        let line = violation.to_string();
        let kind = line.split(':').next().unwrap_or_default().to_owned();
        let of_kind = by_kind.entry(kind).or_default();
        of_kind.push(format!("partition {partition}: {line}"));
    }
    // Writing to a string can't fail.
    for (kind, lines) in &by_kind {
        let _ = writeln!(text, "{kind}: {} times", lines.len());
        for line in lines.iter().take(SHOWN) {
            let _ = writeln!(text, "  {line}");
        }
    }
    if by_kind.is_empty() {
        text += "nothing lost, duplicated, reordered or misplaced";
    }
    text
}

#[cfg(test)]
mod tests {
    use millrace_e2e::history::Value;

    use super::*;

    #[test]
    fn a_gap_is_that_of_the_fault_in_which_it_began() {
        const S: u64 = 1_000_000;
        // In tenths of a second: every tenth, but for two pauses.
        let acked =
            (0..300).filter(|tenth| !(51..80).contains(tenth) && !(150..190).contains(tenth));
        let acks = acked.map(|tenth| Event::Append {
            value: Value {
                producer: 0,
                counter: tenth,
            },
            partition: 0,
            invoked: 0,
            ended: tenth * S / 10,
            outcome: Outcome::Acked { offset: None },
        });
        let fault = |kind: &str, from| Event::Fault {
            kind: kind.to_owned(),
            brokers: Vec::new(),
            from,
            until: from,
        };
        // The second fault begins during the first pause; the third just after the last acknowledgement before the second.
        let faults = [
            fault("kill", 5 * S + 10),
            fault("slow", 7 * S),
            fault("pause", 15 * S - 10),
        ];
        let events: Vec<_> = acks.chain(faults).collect();
        let found: Vec<_> = gaps(&events).into_iter().collect();
        let expected = [
            ("kill", vec![3 * S]),
            ("pause", vec![41 * S / 10]),
            ("slow", vec![S / 10]),
        ];
        assert_eq!(found, expected);
    }
}
