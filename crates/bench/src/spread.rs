//! Distributions of durations: recorded in microseconds with three significant digits, told in milliseconds.
//!
//! What never lives here: when a duration begins. Whoever works by a schedule records from the moment that the
//! schedule names, not from the moment at which the generator got to it: otherwise a stall of the system under
//! test hides the load that it held back.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// The longest duration that is told apart; what takes longer counts as this.
const LONGEST_US: u64 = 3_600_000_000;

/// The columns that [`Spread::cells`] fills.
pub(crate) const COLUMNS: [&str; 4] = ["count", "p50_ms", "p99_ms", "max_ms"];

/// A distribution of durations.
#[derive(Debug, Clone)]
pub(crate) struct Spread(Histogram<u64>);

impl Spread {
    /// An empty one.
    pub(crate) fn new() -> Spread {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3);
        Spread(histogram.expect("the bounds are constants and in order"))
    }

    /// Adds one.
    pub(crate) fn record(&mut self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(LONGEST_US);
        self.0.saturating_record(us.clamp(1, LONGEST_US));
    }

    /// Adds all of another.
    pub(crate) fn add(&mut self, other: &Spread) {
        // Both have the same bounds, which is all that can be refused.
        let _ = self.0.add(&other.0);
    }

    /// How many were recorded.
    pub(crate) fn count(&self) -> u64 {
        self.0.len()
    }

    /// The duration that the share `quantile` (0 to 1) of all is not above, in milliseconds; nothing without any.
    pub(crate) fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        (self.count() > 0).then(|| ms(self.0.value_at_quantile(quantile)))
    }

    /// The longest, in milliseconds.
    pub(crate) fn max_ms(&self) -> Option<f64> {
        (self.count() > 0).then(|| ms(self.0.max()))
    }

    /// Count, p50, p99 and maximum: the cells of [`COLUMNS`].
    pub(crate) fn cells(&self) -> Vec<Value> {
        vec![
            json!(self.count()),
            json!(self.quantile_ms(0.5)),
            json!(self.quantile_ms(0.99)),
            json!(self.max_ms()),
        ]
    }
}

impl Default for Spread {
    fn default() -> Spread {
        Spread::new()
    }
}

impl FromIterator<Duration> for Spread {
    fn from_iter<I: IntoIterator<Item = Duration>>(all: I) -> Spread {
        let mut spread = Spread::new();
        for took in all {
            spread.record(took);
        }
        spread
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "an hour in microseconds is exact in an f64"
)]
fn ms(us: u64) -> f64 {
    // Three significant digits are all that the histogram keeps.
    (us as f64 / 10.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_was_recorded() {
        let spread: Spread = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(spread.count(), 100);
        let near = |found: Option<f64>, wanted: f64| (found.unwrap() - wanted).abs() <= wanted / 500.0;
        assert!(
            near(spread.quantile_ms(0.5), 50.0),
            "{:?}",
            spread.quantile_ms(0.5)
        );
        assert!(
            near(spread.quantile_ms(0.99), 99.0),
            "{:?}",
            spread.quantile_ms(0.99)
        );
        assert!(near(spread.max_ms(), 100.0), "{:?}", spread.max_ms());
    }

    #[test]
    fn nothing_has_no_quantile() {
        assert_eq!(
            Spread::new().cells(),
            vec![json!(0), Value::Null, Value::Null, Value::Null]
        );
    }

    #[test]
    fn what_is_too_long_counts_as_the_longest() {
        let spread: Spread = [Duration::from_secs(10_000)].into_iter().collect();
        assert!(spread.max_ms().unwrap() >= 3_600_000.0);
    }
}
