//! Checks of fields that more than one domain uses.

use std::fmt;

use crate::limits;
use crate::reject::{Code, Reject};

/// A text of at most `max` bytes without control characters.
pub(crate) fn text(field: &str, value: &str, max: usize) -> Result<(), Reject> {
    if value.len() > max {
        return Err(invalid(
            field,
            &format_args!("it has {} bytes; the limit is {max}", value.len()),
        ));
    }
    if value.chars().any(char::is_control) {
        return Err(invalid(field, &"it holds control characters"));
    }
    Ok(())
}

/// A text that must not be empty.
pub(crate) fn filled(field: &str, value: &str, max: usize) -> Result<(), Reject> {
    if value.is_empty() {
        return Err(invalid(field, &"it is empty"));
    }
    text(field, value, max)
}

/// Bytes that must not be empty.
pub(crate) fn bytes(field: &str, value: &[u8], max: usize) -> Result<(), Reject> {
    if value.is_empty() {
        return Err(invalid(field, &"it is empty"));
    }
    if value.len() > max {
        return Err(invalid(
            field,
            &format_args!("it has {} bytes; the limit is {max}", value.len()),
        ));
    }
    Ok(())
}

/// An id that must be one.
pub(crate) fn id(field: &str, value: crate::Id) -> Result<(), Reject> {
    if value.is_zero() {
        Err(invalid(field, &"it is empty"))
    } else {
        Ok(())
    }
}

/// A list of at most `max` entries.
pub(crate) fn count(field: &str, entries: usize, max: usize) -> Result<(), Reject> {
    if entries > max {
        Err(Reject::new(Code::TooMany, [&field, &entries, &max]))
    } else {
        Ok(())
    }
}

/// `[a-z0-9][a-z0-9._-]{0,62}`: what may stand in a certificate's name or a command line.
pub(crate) fn is_short_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let mut bytes = name.bytes();
    name.len() <= limits::SHORT_NAME_MAX
        && bytes.next().is_some_and(plain)
        && bytes.all(|byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'))
}

/// Cuts a text to at most `max` bytes, at a character's border.
pub(crate) fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        let end = (0..=max).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// A refused name as a refusal shows it. Not `{:?}`: what that escapes differs between versions of Rust, and
/// refusals are remembered.
pub(crate) fn quoted(name: &str) -> String {
    let shown: String = name.chars().take(limits::SHORT_NAME_MAX + 1).collect();
    format!("\"{}\"", shown.escape_default())
}

pub(crate) fn invalid(field: &str, cause: &dyn fmt::Display) -> Reject {
    Reject::new(Code::FieldInvalid, [&field, cause])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_at_a_characters_border() {
        assert_eq!(cut("grün".to_owned(), 3), "gr");
        assert_eq!(cut("grün".to_owned(), 4), "grü");
        assert_eq!(cut("grün".to_owned(), 9), "grün");
    }

    #[test]
    fn a_refused_name_is_shown_in_ascii_and_not_in_full() {
        assert_eq!(quoted("Bob"), "\"Bob\"");
        assert_eq!(quoted("ü\n\u{1b}"), r#""\u{fc}\n\u{1b}""#);
        assert_eq!(quoted(&"x".repeat(1_000)).len(), limits::SHORT_NAME_MAX + 3);
    }
}
