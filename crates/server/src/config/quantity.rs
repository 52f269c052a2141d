//! Bounded quantities of the configuration: durations (`"250ms"`, `"5s"`, `"2m"`, `"1h"`), sizes (`"512KiB"`,
//! `"16MiB"`) and counts. The bounds are in the type, so that a value outside of them is refused where it is
//! read and the message can name its line.

use std::fmt;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};

/// A duration from `MIN` to `MAX` milliseconds, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Span<MIN, MAX> {
    /// A default. Fails to compile out of bounds when it is used in a constant.
    pub(crate) const fn ms(ms: u64) -> Self {
        assert!(ms >= MIN && ms <= MAX, "a default is within its bounds");
        Self(ms)
    }

    /// As a duration.
    pub(crate) fn get(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Span<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let ms = parse_unit(&text, &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)]).ok_or_else(
            || {
                D::Error::custom(format!(
                    "{text:?} is no duration; write \"250ms\", \"5s\", \"2m\" or \"1h\""
                ))
            },
        )?;
        if ms < MIN || ms > MAX {
            return Err(D::Error::custom(format!(
                "{text:?} is out of bounds; from {} to {} is allowed",
                show_ms(MIN),
                show_ms(MAX)
            )));
        }
        Ok(Self(ms))
    }
}

/// A size from `MIN` to `MAX` bytes, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Size<MIN, MAX> {
    /// A default. Fails to compile out of bounds when it is used in a constant.
    pub(crate) const fn bytes(bytes: u64) -> Self {
        assert!(bytes >= MIN && bytes <= MAX, "a default is within its bounds");
        Self(bytes)
    }

    /// In bytes.
    pub(crate) fn get(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Size<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = parse_unit(
            &text,
            &[("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)],
        )
        .ok_or_else(|| {
            D::Error::custom(format!(
                "{text:?} is no size; write \"512KiB\", \"16MiB\" or \"1GiB\""
            ))
        })?;
        if bytes < MIN || bytes > MAX {
            return Err(D::Error::custom(format!(
                "{text:?} is out of bounds; from {} to {} is allowed",
                show_bytes(MIN),
                show_bytes(MAX)
            )));
        }
        Ok(Self(bytes))
    }
}

/// A number from `MIN` to `MAX`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Count<MIN, MAX> {
    /// A default. Fails to compile out of bounds when it is used in a constant.
    pub(crate) const fn of(count: u64) -> Self {
        assert!(count >= MIN && count <= MAX, "a default is within its bounds");
        Self(count)
    }

    /// The number.
    pub(crate) fn get(self) -> u64 {
        self.0
    }

    /// The number, as a length.
    pub(crate) fn len(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Count<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number<const MIN: u64, const MAX: u64>;
        impl<const MIN: u64, const MAX: u64> Visitor<'_> for Number<MIN, MAX> {
            type Value = u64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {MIN} to {MAX}")
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<u64, E> {
                u64::try_from(value).map_err(|_| {
                    E::custom(format!(
                        "{value} is out of bounds; from {MIN} to {MAX} is allowed"
                    ))
                })
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<u64, E> {
                Ok(value)
            }
        }
        let count = deserializer.deserialize_u64(Number::<MIN, MAX>)?;
        if count < MIN || count > MAX {
            return Err(D::Error::custom(format!(
                "{count} is out of bounds; from {MIN} to {MAX} is allowed"
            )));
        }
        Ok(Self(count))
    }
}

/// A whole number directly followed by one of the units.
fn parse_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let factor = units.iter().find(|(name, _)| *name == unit.trim_start())?.1;
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn show_ms(ms: u64) -> String {
    match ms {
        ms if ms % 3_600_000 == 0 && ms > 0 => format!("{}h", ms / 3_600_000),
        ms if ms % 60_000 == 0 && ms > 0 => format!("{}m", ms / 60_000),
        ms if ms % 1000 == 0 => format!("{}s", ms / 1000),
        ms => format!("{ms}ms"),
    }
}

fn show_bytes(bytes: u64) -> String {
    match bytes {
        bytes if bytes % (1 << 30) == 0 && bytes > 0 => format!("{}GiB", bytes >> 30),
        bytes if bytes % (1 << 20) == 0 && bytes > 0 => format!("{}MiB", bytes >> 20),
        bytes if bytes % (1 << 10) == 0 && bytes > 0 => format!("{}KiB", bytes >> 10),
        bytes => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct All {
        span: Span<100, 60_000>,
        size: Size<1024, 1_048_576>,
        count: Count<1, 10>,
    }

    fn read(span: &str, size: &str, count: &str) -> Result<All, String> {
        toml::from_str(&format!("span = {span}\nsize = {size}\ncount = {count}"))
            .map_err(|error: toml::de::Error| error.message().to_owned())
    }

    #[test]
    fn units_are_understood() {
        let all = read("\"1m\"", "\"64KiB\"", "3").unwrap();
        assert_eq!(all.span.get(), Duration::from_secs(60));
        assert_eq!(all.size.get(), 65_536);
        assert_eq!((all.count.get(), all.count.len()), (3, 3));
        assert_eq!(
            read("\"100ms\"", "\"1MiB\"", "10").unwrap().span.get(),
            Duration::from_millis(100)
        );
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_with_the_bounds() {
        let refused = |span, size, count| read(span, size, count).unwrap_err();
        assert!(refused("\"99ms\"", "\"1KiB\"", "1").contains("from 100ms to 1m"));
        assert!(refused("\"2m\"", "\"1KiB\"", "1").contains("from 100ms to 1m"));
        assert!(refused("\"1s\"", "\"2MiB\"", "1").contains("from 1KiB to 1MiB"));
        assert!(refused("\"1s\"", "\"1KiB\"", "11").contains("from 1 to 10"));
        assert!(refused("\"1s\"", "\"1KiB\"", "-1").contains("from 1 to 10"));
        assert!(refused("\"99999999999999999999s\"", "\"1KiB\"", "1").contains("no duration"));
        assert!(refused("\"5\"", "\"1KiB\"", "1").contains("no duration"));
        assert!(refused("\"5 weeks\"", "\"1KiB\"", "1").contains("no duration"));
        assert!(refused("\"1s\"", "\"many\"", "1").contains("no size"));
    }
}
