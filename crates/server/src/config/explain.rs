//! From a parser's error to a message that names file, line, key and, for a key that is none, the nearest
//! that is.

use std::path::Path;

/// `palyrad.toml:12: limits.conections: unknown key; did you mean `connections`?`
pub(crate) fn explain(error: &toml::de::Error, text: &str, path: &Path) -> String {
    let file = path.display();
    let Some(span) = error.span() else {
        return format!("{file}: {}", problem(error.message()));
    };
    let start = span.start.min(text.len());
    let line = text.as_bytes()[..start]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count();
    match key_at(text, line) {
        Some(key) => format!("{file}:{}: {key}: {}", line + 1, problem(error.message())),
        None => format!("{file}:{}: {}", line + 1, problem(error.message())),
    }
}

/// The line, counted from 1, on which a dotted key is set.
pub(crate) fn line_of(text: &str, key: &str) -> Option<usize> {
    (0..text.lines().count())
        .find(|line| key_at(text, *line).as_deref() == Some(key))
        .map(|line| line + 1)
}

/// The dotted key that is set on a line, counted from 0; the section's name when the line is its header.
fn key_at(text: &str, line: usize) -> Option<String> {
    let header = |line: &str| {
        Some(
            line.trim()
                .strip_prefix('[')?
                .split(']')
                .next()?
                .trim()
                .to_owned(),
        )
    };
    let lines: Vec<&str> = text.lines().collect();
    let own = lines.get(line)?;
    if let Some(section) = header(own) {
        return Some(section);
    }
    let name = own.split_once('=')?.0.trim();
    let section = lines[..line].iter().rev().find_map(|line| header(line));
    (!name.starts_with('#'))
        .then(|| section.map_or_else(|| name.to_owned(), |section| format!("{section}.{name}")))
}

/// serde's sentence about an unknown field, shortened to the nearest one that exists.
fn problem(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else {
        return message.to_owned();
    };
    let Some((unknown, expected)) = rest.split_once('`') else {
        return message.to_owned();
    };
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    match known.iter().min_by_key(|name| distance(unknown, name)) {
        Some(nearest) if distance(unknown, nearest) <= 1 + unknown.len() / 3 => {
            format!("unknown key; did you mean `{nearest}`?")
        }
        _ => format!("unknown key; known here are {}", known.join(", ")),
    }
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
