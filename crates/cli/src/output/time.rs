//! Times and durations as they are read and shown.
//!
//! In JSON and YAML a time is RFC 3339 in UTC with milliseconds, and `null` when there is none; in tables it
//! is told by its distance from now. Times are milliseconds since the Unix epoch.

use std::time::Duration;

use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const RFC3339: &[BorrowedFormatItem<'static>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
const CLOCK: &[BorrowedFormatItem<'static>] = format_description!("[month]-[day] [hour]:[minute]:[second]");

/// A moment in milliseconds since the Unix epoch; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Moment(pub(crate) u64);

impl Moment {
    fn at(self) -> Option<OffsetDateTime> {
        if self.0 == 0 {
            return None;
        }
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000).ok()
    }

    /// RFC 3339, or nothing.
    pub(crate) fn rfc3339(self) -> Option<String> {
        self.at()?.format(RFC3339).ok()
    }

    /// Month, day and time of day in UTC, for rows that are read one after another.
    pub(crate) fn clock(self) -> String {
        self.at()
            .and_then(|at| at.format(CLOCK).ok())
            .unwrap_or_else(|| "-".to_owned())
    }

    /// "3m ago", "in 2h"; "-" when there is none.
    pub(crate) fn told(self, now_ms: u64) -> String {
        if self.0 == 0 {
            return "-".to_owned();
        }
        match self.0.checked_sub(now_ms) {
            // Up to the next second: what was given ten minutes a moment ago has ten minutes.
            Some(ahead) if ahead >= 1_000 => format!("in {}", span(ahead.next_multiple_of(1_000))),
            Some(_) => "now".to_owned(),
            None if now_ms - self.0 < 1_000 => "now".to_owned(),
            None => format!("{} ago", span(now_ms - self.0)),
        }
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.rfc3339().serialize(serializer)
    }
}

/// A duration in milliseconds with its two largest units: "2d 3h", "5m 10s", "850ms".
pub(crate) fn span(ms: u64) -> String {
    let seconds = ms / 1_000;
    let parts = [
        (seconds / 86_400, "d"),
        (seconds / 3_600 % 24, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
    ];
    let Some(first) = parts.iter().position(|(count, _)| *count > 0) else {
        return format!("{ms}ms");
    };
    let second = parts.get(first + 1).filter(|(count, _)| *count > 0);
    let (count, unit) = parts[first];
    match second {
        // Behind days and hours the seconds say nothing, but minutes and seconds belong together.
        Some((rest, next)) => format!("{count}{unit}{rest}{next}"),
        None => format!("{count}{unit}"),
    }
}

/// Reads a duration that something is given or may take: as [`parse_duration`], and more than nothing.
pub(crate) fn parse_limit(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err(format!(
            "{text:?} leaves no time: write 500ms, 30s, 10m, 1h or 2d"
        )),
        limit => Ok(limit),
    }
}

/// Reads "30s", "10m", "1h30m", "250ms", "2d"; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no duration: write 500ms, 30s, 10m, 1h or 2d");
    if text.is_empty() {
        return Err(bad());
    }
    if let Ok(seconds) = text.parse::<u32>() {
        return Ok(Duration::from_secs(seconds.into()));
    }
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let factor = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        total = number
            .checked_mul(factor)
            .and_then(|ms| total.checked_add(ms))
            .ok_or_else(bad)?;
        rest = tail;
    }
    Ok(Duration::from_millis(total))
}

/// A duration in whole milliseconds; the largest value when it does not fit.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_rfc3339_and_null() {
        assert_eq!(
            serde_json::to_string(&Moment(1_700_000_000_123)).unwrap(),
            "\"2023-11-14T22:13:20.123Z\""
        );
        assert_eq!(serde_json::to_string(&Moment(0)).unwrap(), "null");
    }

    #[test]
    fn moments_are_told_by_their_distance() {
        let now = 1_700_000_000_000;
        let cases = [
            (now - 500, "now"),
            (now - 61_000, "1m1s ago"),
            (now + 7_200_000, "in 2h"),
            (now + 599_990, "in 10m"),
            (0, "-"),
        ];
        for (at, told) in cases {
            assert_eq!(Moment(at).told(now), told);
        }
        assert_eq!(span(90_000_000), "1d1h");
        assert_eq!(span(86_400_000 + 59_000), "1d");
        assert_eq!(span(850), "850ms");
    }

    #[test]
    fn durations_are_read_strictly() {
        let ms = |text: &str| parse_duration(text).map(|duration| duration.as_millis());
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!(ms("1h30m"), Ok(5_400_000));
        assert_eq!(ms("20"), Ok(20_000));
        assert!(parse_limit("0").is_err() && parse_limit("0ms").is_err() && parse_limit("1ms").is_ok());
        for bad in ["", "s", "1x", "1 s", "-1s", "99999999999999999999d"] {
            assert!(ms(bad).is_err(), "{bad:?}");
        }
    }
}
