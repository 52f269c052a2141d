//! Whether bytes are JSON that every node can parse: valid UTF-8, one value, not nested too deeply.
//!
//! Invariant: neither check recurses, so no input can exhaust the stack.

use serde::de::IgnoredAny;

use crate::error::Error;
use crate::limits::JSON_DEPTH;

/// Checks a payload or result.
///
/// # Errors
/// [`Error::Invalid`] with the place of the first mistake.
pub(crate) fn check(field: &'static str, bytes: &[u8]) -> Result<(), Error> {
    let bad = |cause: String| Error::invalid(field, cause, "send one JSON value, at most 64 levels deep");
    let text = std::str::from_utf8(bytes)
        .map_err(|error| bad(format!("not UTF-8 after byte {}", error.valid_up_to())))?;
    let deepest = depth(text.as_bytes());
    if deepest > JSON_DEPTH {
        return Err(bad(format!("nested {deepest} levels deep")));
    }
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| bad(format!("not JSON: {error}")))?;
    Ok(())
}

/// The deepest nesting of brackets outside of strings. Meaningful for JSON; finite for anything.
fn depth(bytes: &[u8]) -> usize {
    let (mut now, mut deepest, mut in_string, mut escaped) = (0usize, 0usize, false, false);
    for byte in bytes {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b'[' | b'{') => {
                now += 1;
                deepest = deepest.max(now);
            }
            (false, b']' | b'}') => now = now.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(levels: usize) -> String {
        "[".repeat(levels) + &"]".repeat(levels)
    }

    #[test]
    fn json_passes_and_what_is_not_is_refused() {
        for good in [
            "{}",
            "null",
            " [1, \"]]\\\"[[\", {\"a\": 1e9}] ",
            "\"\u{e9}\"",
            &nested(JSON_DEPTH),
        ] {
            assert_eq!(check("payload", good.as_bytes()), Ok(()), "{good}");
        }
        let open = "[".repeat(500_000);
        for bad in [
            "",
            "{",
            "{}{}",
            "{'a':1}",
            "nul",
            "[1,]",
            &nested(JSON_DEPTH + 1),
            &open,
        ] {
            assert!(matches!(
                check("payload", bad.as_bytes()),
                Err(Error::Invalid { field: "payload", .. })
            ));
        }
        assert!(check("payload", b"\"\xff\"").is_err());
    }
}
