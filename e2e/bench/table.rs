//! Collects figures from several rounds and prints medians, spread and ratio as Markdown tables.

use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use crate::peer::Peer;

/// One table: figures of Millrace beside those of a peer or a limit.
pub(crate) struct Report {
    title: String,
    /// Heads the column beside Millrace's.
    other: &'static str,
    rows: Vec<Row>,
}

struct Row {
    metric: String,
    goal: Option<Goal>,
    millrace: Vec<f64>,
    other: Vec<f64>,
}

/// Whose figure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    Millrace,
    Other,
}

impl From<Peer> for Column {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Millrace => Self::Millrace,
            Peer::Kafka => Self::Other,
        }
    }
}

/// What Millrace's median must reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// At least this many times the other's.
    RatioAtLeast(f64),
    /// At most this many times the other's.
    RatioAtMost(f64),
    /// At most this, whatever the other's.
    AtMost(f64),
}

impl Report {
    pub(crate) fn new(title: impl Into<String>, other: &'static str) -> Self {
        Self {
            title: title.into(),
            other,
            rows: Vec::new(),
        }
    }

    /// Adds one round's figure.
    pub(crate) fn add(
        &mut self,
        column: impl Into<Column>,
        metric: impl Into<String>,
        goal: Option<Goal>,
        value: f64,
    ) {
        let metric = metric.into();
        eprintln!("    {metric}: {}", number(value));
        let at = self.rows.iter().position(|row| row.metric == metric);
        let at = at.unwrap_or_else(|| {
            self.rows.push(Row {
                metric,
                goal,
                millrace: Vec::new(),
                other: Vec::new(),
            });
            self.rows.len() - 1
        });
        match column.into() {
            Column::Millrace => self.rows[at].millrace.push(value),
            Column::Other => self.rows[at].other.push(value),
        }
    }

    /// The table in Markdown, under its title.
    pub(crate) fn markdown(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(ASCII_MARKDOWN)
            .set_header(["", "Millrace", self.other, "ratio", "goal", "met"]);
        for row in &self.rows {
            let (millrace, other) = (median(&row.millrace), median(&row.other));
            let ratio = millrace
                .zip(other)
                .map(|(millrace, other)| millrace / other);
            let met = row.goal.and_then(|goal| goal.met(millrace, ratio));
            table.add_row([
                row.metric.clone(),
                spread(&row.millrace),
                spread(&row.other),
                ratio.map(number).unwrap_or_default(),
                row.goal.map(|goal| goal.to_string()).unwrap_or_default(),
                met.map_or("", |met| if met { "yes" } else { "no" })
                    .to_owned(),
            ]);
        }
        format!("### {}\n\n{table}\n", self.title)
    }
}

/// One table: figures of several candidates, a row for each.
pub(crate) struct Comparison {
    title: String,
    columns: Vec<&'static str>,
    rows: Vec<(&'static str, Vec<Vec<f64>>)>,
}

impl Comparison {
    pub(crate) fn new(title: impl Into<String>, columns: &[&'static str]) -> Self {
        Self {
            title: title.into(),
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds one round's figures of a candidate, one for each column; `None` where it has none.
    pub(crate) fn add(&mut self, candidate: &'static str, values: &[Option<f64>]) {
        let at = self.rows.iter().position(|(name, _)| *name == candidate);
        let at = at.unwrap_or_else(|| {
            let empty = vec![Vec::new(); self.columns.len()];
            self.rows.push((candidate, empty));
            self.rows.len() - 1
        });
        for ((column, figures), value) in self.columns.iter().zip(&mut self.rows[at].1).zip(values)
        {
            if let Some(value) = value {
                eprintln!("    {candidate}, {column}: {}", number(*value));
                figures.push(*value);
            }
        }
    }

    /// The table in Markdown, under its title.
    pub(crate) fn markdown(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(ASCII_MARKDOWN)
            .set_header([""].iter().chain(&self.columns));
        for (candidate, figures) in &self.rows {
            let name = std::iter::once((*candidate).to_owned());
            table.add_row(name.chain(figures.iter().map(|values| spread(values))));
        }
        format!("### {}\n\n{table}\n", self.title)
    }
}

impl Goal {
    fn met(self, value: Option<f64>, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtLeast(least) => ratio.map(|ratio| ratio >= least),
            Self::RatioAtMost(most) => ratio.map(|ratio| ratio <= most),
            Self::AtMost(most) => value.map(|value| value <= most),
        }
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RatioAtLeast(least) => write!(f, "ratio ≥ {least}"),
            Self::RatioAtMost(most) => write!(f, "ratio ≤ {most}"),
            Self::AtMost(most) => write!(f, "≤ {most}"),
        }
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (
        sorted.get(sorted.len().saturating_sub(1) / 2)?,
        sorted.get(sorted.len() / 2)?,
    );
    Some((low + high) / 2.0)
}

/// `median (min–max)`, or only the figure if there is one.
fn spread(values: &[f64]) -> String {
    let Some(median) = median(values) else {
        return String::new();
    };
    let min = values.iter().copied().fold(f64::INFINITY, f64::min);
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match values.len() {
        1 => number(median),
        _ => format!("{} ({}–{})", number(median), number(min), number(max)),
    }
}

/// Three digits that count, and commas in large numbers.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_median_spread_ratio_and_whether_the_goal_is_met() {
        let mut report = Report::new("Produce", "Kafka");
        for (ours, theirs) in [
            (300_000.0, 100_000.0),
            (250_000.0, 120_000.0),
            (200_000.0, 125_000.5),
        ] {
            report.add(
                Peer::Millrace,
                "records/s",
                Some(Goal::RatioAtLeast(2.0)),
                ours,
            );
            report.add(
                Peer::Kafka,
                "records/s",
                Some(Goal::RatioAtLeast(2.0)),
                theirs,
            );
        }
        report.add(
            Peer::Millrace,
            "written / produced",
            Some(Goal::AtMost(2.1)),
            2.25,
        );
        let text = report.markdown();
        let cells: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        assert_eq!(
            cells[2][1..7],
            [
                "records/s",
                "250,000 (200,000–300,000)",
                "120,000 (100,000–125,000)",
                "2.08",
                "ratio ≥ 2",
                "yes"
            ]
        );
        assert_eq!(
            cells[3][1..7],
            ["written / produced", "2.25", "", "", "≤ 2.1", "no"]
        );
    }

    #[test]
    fn a_comparison_has_a_row_for_each_candidate() {
        let mut comparison = Comparison::new("Layouts", &["MB/s", "s"]);
        comparison.add("one", &[Some(1.0), Some(5.0)]);
        comparison.add("two", &[Some(4.0), None]);
        comparison.add("one", &[Some(3.0), Some(5.0)]);
        let text = comparison.markdown();
        let cells: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        assert_eq!(cells[0][1..4], ["", "MB/s", "s"]);
        assert_eq!(
            cells[2][1..4],
            ["one", "2.00 (1.00–3.00)", "5.00 (5.00–5.00)"]
        );
        assert_eq!(cells[3][1..4], ["two", "4.00", ""]);
    }

    #[test]
    fn the_median_of_an_even_count_is_the_mean_of_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn numbers_keep_three_digits_that_count() {
        assert_eq!(
            [0.456, 12.34, 123.4, 1_234_567.8].map(number),
            ["0.46", "12.3", "123", "1,234,568"]
        );
    }
}
