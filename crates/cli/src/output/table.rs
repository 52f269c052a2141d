//! Aligned columns for people.
//!
//! Invariants: a cell never breaks a row (control characters of foreign text are replaced, so that nothing
//! that a node calls itself can write to the terminal); colour is only added around a cell and never counts
//! for its width.

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    /// Its title, in capitals.
    pub(crate) title: &'static str,
    /// Shown with `-o wide` only.
    pub(crate) wide: bool,
}

/// A column that is always shown.
pub(crate) const fn column(title: &'static str) -> Column {
    Column { title, wide: false }
}

/// A column that `-o wide` adds.
pub(crate) const fn wide(title: &'static str) -> Column {
    Column { title, wide: true }
}

/// How a table is drawn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    /// Whether wide columns are shown.
    pub(crate) wide: bool,
    /// Whether words of state get a colour.
    pub(crate) color: bool,
}

/// Draws rows under their titles; each line ends with a line feed. No rows: only titles. Without titles the
/// columns are as wide as with them, so that rows that come later line up with the first.
pub(crate) fn draw(columns: &[Column], rows: &[Vec<String>], style: Style, titles: bool) -> String {
    let shown: Vec<usize> = (0..columns.len())
        .filter(|&at| style.wide || !columns[at].wide)
        .collect();
    let clean: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            shown
                .iter()
                .map(|&at| printable(row.get(at).map_or("", |cell| cell)))
                .collect()
        })
        .collect();
    let mut widths: Vec<usize> = shown
        .iter()
        .map(|&at| columns[at].title.chars().count())
        .collect();
    for row in &clean {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    if titles {
        let heads: Vec<String> = shown.iter().map(|&at| columns[at].title.to_owned()).collect();
        push_line(&mut out, &heads, &widths, |_| None);
    }
    for row in &clean {
        push_line(&mut out, row, &widths, |cell| {
            if style.color { tone(cell) } else { None }
        });
    }
    out
}

fn push_line(
    out: &mut String,
    cells: &[String],
    widths: &[usize],
    tone: impl Fn(&str) -> Option<&'static str>,
) {
    let last = cells.len().saturating_sub(1);
    for (at, (cell, width)) in cells.iter().zip(widths).enumerate() {
        match tone(cell) {
            Some(code) => out.push_str(&format!("\x1b[{code}m{cell}\x1b[0m")),
            None => out.push_str(cell),
        }
        if at < last {
            let padding = width - cell.chars().count() + 2;
            out.extend(std::iter::repeat_n(' ', padding));
        }
    }
    while out.ends_with(' ') {
        out.pop();
    }
    out.push('\n');
}

/// "LABEL  value" lines for one thing; pairs with an empty value are left out.
pub(crate) fn facts(pairs: &[(&str, String)]) -> String {
    let pairs: Vec<&(&str, String)> = pairs.iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = pairs
        .iter()
        .map(|(label, _)| label.chars().count())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for (label, value) in pairs {
        let mut lines = value.lines();
        out.push_str(&format!(
            "{label:width$}  {}\n",
            printable(lines.next().unwrap_or(""))
        ));
        for line in lines {
            out.push_str(&format!("{:width$}  {}\n", "", printable(line)));
        }
    }
    out
}

/// The text without control characters, and "-" when it is empty.
fn printable(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    text.chars()
        .map(|c| if is_unsafe(c) { '\u{fffd}' } else { c })
        .collect()
}

/// Control characters, and those that turn the direction of text around.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The colour of a word of state.
fn tone(word: &str) -> Option<&'static str> {
    match word {
        "online" | "voter" | "leader" | "trusted" | "active" | "approved" | "completed" | "succeeded"
        | "open" => Some("32"),
        "offline" | "revoked" | "unreachable" | "failed" | "timed_out" | "session_lost" | "burned" => {
            Some("31")
        }
        "pending_approval"
        | "queued"
        | "dispatched"
        | "awaiting_local_mediation"
        | "joining"
        | "learner"
        | "candidate" => Some("33"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column] = &[column("ID"), wide("NOTE"), column("STATUS")];
    const PLAIN: Style = Style {
        wide: false,
        color: false,
    };

    fn row(cells: [&str; 3]) -> Vec<String> {
        cells.map(str::to_owned).to_vec()
    }

    #[test]
    fn columns_line_up_and_wide_ones_are_left_out() {
        let rows = [row(["a", "x", "online"]), row(["long-id", "y", ""])];
        assert_eq!(
            draw(COLUMNS, &rows, PLAIN, true),
            "ID       STATUS\na        online\nlong-id  -\n"
        );
        let drawn = draw(COLUMNS, &rows, Style { wide: true, ..PLAIN }, false);
        assert_eq!(drawn, "a        x     online\nlong-id  y     -\n");
    }

    #[test]
    fn foreign_text_cannot_steer_the_terminal() {
        let rows = [row(["\x1b[2Jx\ny", "", "\u{202e}z"])];
        let drawn = draw(COLUMNS, &rows, PLAIN, false);
        assert_eq!(drawn.lines().count(), 1);
        assert!(
            !drawn.contains('\x1b') && !drawn.contains('\u{202e}'),
            "{drawn:?}"
        );
    }

    #[test]
    fn colour_does_not_move_columns() {
        let columns = [column("STATUS"), column("ID")];
        let rows = [
            vec!["online".to_owned(), "a".to_owned()],
            vec!["x".to_owned(), "b".to_owned()],
        ];
        let drawn = draw(
            &columns,
            &rows,
            Style {
                wide: false,
                color: true,
            },
            false,
        );
        assert_eq!(drawn, "\x1b[32monline\x1b[0m  a\nx       b\n");
    }

    #[test]
    fn facts_leave_out_what_is_empty() {
        assert_eq!(
            facts(&[
                ("id", "1".to_owned()),
                ("x", String::new()),
                ("name", "n".to_owned())
            ]),
            "id    1\nname  n\n"
        );
    }
}
