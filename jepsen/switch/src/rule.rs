//! What a directed link does to the frames that pass it.

use std::time::Duration;

/// How a frame is damaged: one bit of it is turned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Damage {
    /// Somewhere after the Ethernet header. The receiver's kernel finds a wrong checksum and drops it: a loss.
    #[default]
    Visible,
    /// In what a TCP segment or UDP datagram carries, with the checksum made to fit: the receiver's program gets it,
    /// and whatever protects the content has to notice. Frames that carry nothing pass unharmed.
    Sealed,
}

/// The rule of one directed link. The default lets everything through at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Nothing passes.
    pub cut: bool,
    /// Each frame arrives this much later.
    pub delay: Duration,
    /// And up to this much later again, drawn evenly; order is kept.
    pub jitter: Duration,
    /// Percentage of frames that later ones overtake.
    pub reorder: f64,
    /// How much longer a frame is held that others shall overtake.
    pub reorder_by: Duration,
    /// Percentage of frames that vanish.
    pub loss: f64,
    /// Percentage of frames that arrive twice.
    pub duplicate: f64,
    /// Percentage of frames that are damaged.
    pub corrupt: f64,
    /// How.
    pub damage: Damage,
    /// Bytes a second; `None` for as fast as it goes.
    pub rate: Option<u64>,
    /// Frames that may be under way; what comes on top is dropped, and counted.
    pub queue: usize,
}

/// A second of a busy link between two replicas; a link with `rate` should have fewer, or it delays by minutes.
pub const QUEUE: usize = 65_536;

impl Default for Rule {
    fn default() -> Self {
        Rule {
            cut: false,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            reorder: 0.0,
            reorder_by: Duration::ZERO,
            loss: 0.0,
            duplicate: 0.0,
            corrupt: 0.0,
            damage: Damage::Visible,
            rate: None,
            queue: QUEUE,
        }
    }
}

impl Rule {
    /// Why this can't be a rule: a percentage that is none, a rate or a queue of nothing.
    ///
    /// # Errors
    /// One line that names the field.
    pub fn check(&self) -> Result<(), String> {
        let percentages = [
            ("reorder", self.reorder),
            ("loss", self.loss),
            ("duplicate", self.duplicate),
            ("corrupt", self.corrupt),
        ];
        for (name, percent) in percentages {
            if !(0.0..=100.0).contains(&percent) {
                return Err(format!("{name} is {percent}; it is a percentage, 0 to 100"));
            }
        }
        if self.rate == Some(0) {
            return Err("rate is 0 bytes a second; say cut to let nothing pass".to_owned());
        }
        if self.queue == 0 {
            return Err("queue is 0 frames; say cut to let nothing pass".to_owned());
        }
        if self.reorder > 0.0 && self.reorder_by.is_zero() {
            return Err(
                "reorder needs reorder_by: how long a frame is held for others to overtake it".to_owned(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_make_no_sense_are_refused_by_name() {
        let cases = [
            (
                Rule {
                    loss: 101.0,
                    ..Rule::default()
                },
                "loss is 101",
            ),
            (
                Rule {
                    corrupt: f64::NAN,
                    ..Rule::default()
                },
                "corrupt is NaN",
            ),
            (
                Rule {
                    rate: Some(0),
                    ..Rule::default()
                },
                "rate is 0",
            ),
            (
                Rule {
                    queue: 0,
                    ..Rule::default()
                },
                "queue is 0",
            ),
            (
                Rule {
                    reorder: 1.0,
                    ..Rule::default()
                },
                "reorder needs",
            ),
        ];
        for (rule, why) in cases {
            let error = rule.check().expect_err(why);
            assert!(error.starts_with(why), "{error}");
        }
        assert_eq!(Rule::default().check(), Ok(()));
    }
}
