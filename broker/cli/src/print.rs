//! Prints what a subcommand found as a table or a document.

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::failure::Failure;
use crate::output;
use crate::text::Layout;

/// Something with rows.
pub(crate) trait Printable: Serialize {
    /// The names of the columns; one that begins with `#` holds numbers.
    fn columns(&self) -> &'static [&'static str];
    /// The rows of the table.
    fn rows(&self) -> Vec<Vec<String>>;
    /// What `-o name` prints.
    fn names(&self) -> Vec<String>;
    /// What stands above the table.
    fn heading(&self) -> String {
        String::new()
    }
}

/// A value, or that there is none.
pub(crate) fn shown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| value.to_string())
}

/// Prints it.
pub(crate) fn print(what: &impl Printable, layout: Layout) -> Result<(), Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(format!("can't print the result: {error}"));
    let text = match layout {
        Layout::Table => format!("{}{}\n", what.heading(), table(what)),
        Layout::Json => serde_json::to_string_pretty(what).map_err(|error| failed(&error))? + "\n",
        Layout::Yaml => serde_yaml::to_string(what).map_err(|error| failed(&error))?,
        Layout::Name => what
            .names()
            .iter()
            .map(|name| format!("{name}\n"))
            .collect(),
    };
    output::print(&text)
}

/// Without lines and trailing spaces, so that it can be cut with the usual tools.
fn table(what: &impl Printable) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let title = |column: &&'static str| column.trim_start_matches('#').to_uppercase();
    table.set_header(what.columns().iter().map(title));
    for row in what.rows() {
        table.add_row(row.iter().map(Cell::new));
    }
    let last = what.columns().len() - 1;
    for (index, name) in what.columns().iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, if index == last { 0 } else { 3 }));
            if name.starts_with('#') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Two;

    impl Printable for Two {
        fn columns(&self) -> &'static [&'static str] {
            &["name", "#count"]
        }

        fn rows(&self) -> Vec<Vec<String>> {
            vec![
                vec!["a".into(), "1".into()],
                vec!["long-name".into(), "1000".into()],
            ]
        }

        fn names(&self) -> Vec<String> {
            Vec::new()
        }
    }

    #[test]
    fn a_table_is_aligned_and_has_no_lines() {
        assert_eq!(
            table(&Two),
            "NAME        COUNT\na               1\nlong-name    1000"
        );
    }
}
