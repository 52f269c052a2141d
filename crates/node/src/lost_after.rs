//! How long this node may be away before the cluster counts it as gone: text and number.
//!
//! Invariant: what is accepted here is accepted by the cluster.

use std::time::Duration;

use crate::capability::parse_duration;
use crate::{Error, Kind, Result};

/// As long as it takes.
pub(crate) const NEVER: u64 = u64::MAX;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3_600);

/// Milliseconds of `24h`, `30d`; [`NEVER`] for `never` and `0`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_lost_after(text: &str) -> std::result::Result<u64, String> {
    if matches!(text, "never" | "0") {
        return Ok(NEVER);
    }
    let span = match text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok()) {
        Some(days) => Duration::from_secs(u64::from(days) * 24 * 3_600),
        None => parse_duration(text)?,
    };
    if (SHORTEST..=LONGEST).contains(&span) {
        return Ok(u64::try_from(span.as_millis()).unwrap_or(NEVER));
    }
    Err(format!("{text:?} is not between 1s and 366d; or write never"))
}

/// What the configuration or the option says; 0, as the cluster has it, when neither says anything.
pub(crate) fn lost_after(text: Option<&str>) -> Result<u64> {
    let Some(text) = text else { return Ok(0) };
    parse_lost_after(text).map_err(|why| {
        Error::new(
            Kind::Usage,
            "N0510",
            format!("lost_after: {why}"),
            "correct `lost_after` in node.toml, or the --lost-after option",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_bounds_and_never_is_one() {
        assert_eq!(parse_lost_after("24h"), Ok(86_400_000));
        assert_eq!(parse_lost_after("30d"), Ok(30 * 86_400_000));
        assert_eq!(
            (parse_lost_after("never"), parse_lost_after("0")),
            (Ok(NEVER), Ok(NEVER))
        );
        for bad in ["", "soon", "500ms", "367d", "-1h"] {
            assert!(parse_lost_after(bad).is_err(), "{bad}");
        }
        assert_eq!(lost_after(None).unwrap(), 0);
        assert_eq!(lost_after(Some("soon")).unwrap_err().code, "N0510");
    }
}
