//! Aligned columns for people.
//!
//! Invariants: a cell never breaks a row (control characters of foreign text are replaced, so that nothing
//! that a node calls itself can write to the terminal); colour is only added around a cell and never counts
//! for its width; what is cut to fit a terminal is free text, never an id.

use unicode_width::UnicodeWidthStr;

/// Free text is not cut to less than this.
const TEXT_MIN: usize = 12;

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    /// Its title, in capitals.
    pub(crate) title: &'static str,
    /// Shown with `-o wide` only.
    pub(crate) wide: bool,
    /// Free text, which is cut when a terminal has no room for it.
    pub(crate) text: bool,
}

impl Column {
    /// The same column, with `-o wide` only.
    pub(crate) const fn wide(self) -> Column {
        Column { wide: true, ..self }
    }
}

/// A column that is always shown.
pub(crate) const fn column(title: &'static str) -> Column {
    Column {
        title,
        wide: false,
        text: false,
    }
}

/// A column of free text.
pub(crate) const fn text(title: &'static str) -> Column {
    Column {
        text: true,
        ..column(title)
    }
}

/// A column that `-o wide` adds.
pub(crate) const fn wide(title: &'static str) -> Column {
    column(title).wide()
}

/// How a table is drawn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    /// Whether wide columns are shown.
    pub(crate) wide: bool,
    /// Whether words of state get a colour.
    pub(crate) color: bool,
    /// How many columns the terminal has; nothing is cut without one, nor with `wide`.
    pub(crate) room: Option<usize>,
}

/// Draws rows under their titles; each line ends with a line feed. No rows: only titles. Without titles the
/// columns are as wide as with them, so that rows that come later line up with the first.
pub(crate) fn draw(columns: &[Column], rows: &[Vec<String>], style: Style, titles: bool) -> String {
    draw_on(columns, rows, style, titles, &mut Vec::new())
}

/// The same as the next part of a table: its columns are at least as wide as those of the parts before, which
/// `widths` keeps.
pub(crate) fn draw_on(
    columns: &[Column],
    rows: &[Vec<String>],
    style: Style,
    titles: bool,
    widths: &mut Vec<usize>,
) -> String {
    let shown: Vec<usize> = (0..columns.len())
        .filter(|&at| style.wide || !columns[at].wide)
        .collect();
    let mut clean: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            shown
                .iter()
                .map(|&at| printable(row.get(at).map_or("", |cell| cell)))
                .collect()
        })
        .collect();
    widths.resize(shown.len(), 0);
    for (width, &at) in widths.iter_mut().zip(&shown) {
        *width = (*width).max(columns[at].title.width());
    }
    for row in &clean {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width());
        }
    }
    let mut widths = widths.clone();
    if let Some(room) = style.room.filter(|_| !style.wide) {
        let texts: Vec<usize> = (0..shown.len()).filter(|&at| columns[shown[at]].text).collect();
        squeeze(&mut widths, &texts, room);
        for row in &mut clean {
            for &at in &texts {
                cut(&mut row[at], widths[at]);
            }
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

/// Takes what is too much from the columns of free text, the widest first.
fn squeeze(widths: &mut [usize], texts: &[usize], room: usize) {
    let gaps = 2 * widths.len().saturating_sub(1);
    loop {
        let excess = (widths.iter().sum::<usize>() + gaps).saturating_sub(room);
        let widest = texts.iter().copied().max_by_key(|&at| widths[at]);
        let Some(at) = widest.filter(|&at| excess > 0 && widths[at] > TEXT_MIN) else {
            return;
        };
        let next = texts
            .iter()
            .filter(|&&other| other != at)
            .map(|&other| widths[other])
            .max();
        let floor = next.unwrap_or(0).max(TEXT_MIN).min(widths[at] - 1);
        widths[at] = floor.max(widths[at].saturating_sub(excess));
    }
}

/// Cuts a text to a width, and shows that it did.
fn cut(text: &mut String, width: usize) {
    if text.width() <= width {
        return;
    }
    while text.width() + 1 > width {
        if text.pop().is_none() {
            break;
        }
    }
    text.push('\u{2026}');
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
            let padding = width.saturating_sub(cell.width()) + 2;
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
    let width = pairs.iter().map(|(label, _)| label.width()).max().unwrap_or(0);
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

/// The text on one line and without anything that steers a terminal, and "-" when it is empty.
fn printable(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    text.chars()
        .map(|c| if is_unsafe(c) { REPLACED } else { c })
        .collect()
}

/// The text without anything that steers a terminal. Line feeds stay.
pub(crate) fn harmless(text: &str) -> String {
    let safe = |c: char| c == '\n' || !is_unsafe(c);
    text.chars().map(|c| if safe(c) { c } else { REPLACED }).collect()
}

/// JSON in which everything that steers a terminal is written as an escape: the same value, also where
/// somebody reads it on a screen. (Such characters can only stand in its strings.)
pub(crate) fn harmless_json(json: String) -> String {
    // What JSON itself does not escape is beyond ASCII, but for DEL.
    let special = |c: char| is_unsafe(c) && c != '\n';
    if !json.contains(special) {
        return json;
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if special(c) {
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            out.push(c);
        }
    }
    out
}

/// What stands for a character that is not shown.
const REPLACED: char = '\u{fffd}';

/// Control characters, those that end a line in Unicode, and those that turn the direction of text around.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
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
        room: None,
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
        let drawn = draw(&columns, &rows, Style { color: true, ..PLAIN }, false);
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

    #[test]
    fn wide_characters_keep_columns_in_line() {
        let rows = [row(["\u{65e5}\u{672c}", "", "a"]), row(["xy", "", "b"])];
        assert_eq!(
            draw(COLUMNS, &rows, PLAIN, false),
            "\u{65e5}\u{672c}  a\nxy    b\n"
        );
    }

    #[test]
    fn rows_that_come_later_line_up() {
        let mut widths = Vec::new();
        let first = draw_on(COLUMNS, &[row(["a-long-one", "", "x"])], PLAIN, true, &mut widths);
        let second = draw_on(COLUMNS, &[row(["b", "", "y"])], PLAIN, false, &mut widths);
        assert_eq!(second, "b           y\n");
        assert_eq!(first.find("STATUS"), second.find('y'));
    }

    #[test]
    fn a_narrow_terminal_cuts_text_and_never_ids() {
        let columns = [column("ID"), text("NAME"), text("WHY")];
        let rows = [row([
            "01ARZ3NDEKTSV4RRFFQ69G5FAV",
            "a-name-of-some-length",
            "a reason that is much longer than that",
        ])];
        let narrow = |room| {
            draw(
                &columns,
                &rows,
                Style {
                    room: Some(room),
                    ..PLAIN
                },
                false,
            )
        };
        let fits = narrow(75);
        assert_eq!(fits.trim_end().width(), 75, "{fits}");
        assert!(
            fits.contains("a-name-of-some-length") && fits.contains('\u{2026}'),
            "{fits}"
        );
        let tiny = narrow(20);
        assert!(
            tiny.starts_with("01ARZ3NDEKTSV4RRFFQ69G5FAV  a-name-of-s\u{2026}  "),
            "{tiny}"
        );
        assert_eq!(narrow(200), draw(&columns, &rows, PLAIN, false));
    }

    #[test]
    fn json_on_a_screen_steers_nothing_and_says_the_same() {
        let value = serde_json::json!({"a": "\u{9b}31m\u{7f}\u{202e}\u{1b}", "b": "plain \u{e9}"});
        let text = harmless_json(serde_json::to_string_pretty(&value).unwrap());
        assert!(!text.contains(|c: char| is_unsafe(c) && c != '\n'), "{text:?}");
        assert!(text.contains("plain \u{e9}"), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
        assert_eq!(harmless("a\nb\u{1b}[2J"), "a\nb\u{fffd}[2J");
    }
}
