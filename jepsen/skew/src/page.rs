//! The page through which a harness tells a process how wrong its wall clock is, and hears that it was read.
//!
//! One file, two users: the shim maps it, the harness includes this very source file (linking the shim would replace
//! the harness's own clock). The layout is eight 64-bit words in the machine's byte order:
//!
//! | word | written by | meaning |
//! |---|---|---|
//! | 0 | harness | [`MAGIC`] |
//! | 1, 2, 3 | harness | [`Setting`]: offset, drift, since |
//! | 4 | harness | [`Setting::sum`] of the three |
//! | 5 | shim | how often it answered with a clock that is not the machine's |
//! | 6 | shim | the last moment it showed, nanoseconds since the Unix epoch |
//! | 7 | shim | processes that have mapped the page |
//!
//! A setting is believed only together with its sum, so one write of words 1 to 4 needs no lock: a reader that
//! meets half of it sees that, and looks again. A page that stays broken means: no fault, the machine's own time.

/// Length of the file; a page of memory, for that is what is mapped.
pub const PAGE_LEN: usize = 4096;
/// The first word: `jepsenSK`.
pub const MAGIC: u64 = u64::from_be_bytes(*b"jepsenSK");
/// Where the setting begins, in bytes.
pub const SETTING_AT: usize = 8;
/// Where the shim's counters begin, in bytes.
pub const SEEN_AT: usize = 40;
/// Names the page's file to the shim.
pub const VARIABLE: &str = "JEPSEN_SKEW";

const BILLION: i128 = 1_000_000_000;

/// How far a wall clock is off, as a function of the true time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// Nanoseconds ahead of the true time.
    pub offset: i64,
    /// Nanoseconds that it gains in each true second; negative when it is slow.
    pub drift: i64,
    /// The true time at which the drift began, nanoseconds since the Unix epoch.
    pub since: i64,
}

impl Setting {
    /// What the clock shows at a true moment; both in nanoseconds since the Unix epoch.
    #[must_use]
    pub fn shown(&self, real: i64) -> i64 {
        let elapsed = i128::from(real) - i128::from(self.since);
        let gained = elapsed * i128::from(self.drift) / BILLION;
        clamp(i128::from(real) + i128::from(self.offset) + gained)
    }

    /// The true moment at which the clock shows `shown`: the inverse of [`Setting::shown`], to a nanosecond. A clock
    /// that stands still or runs backwards never gets anywhere: then the offset alone counts.
    #[must_use]
    pub fn real(&self, shown: i64) -> i64 {
        let rate = BILLION + i128::from(self.drift);
        let steady = i128::from(shown) - i128::from(self.offset);
        if rate <= 0 {
            return clamp(steady);
        }
        let elapsed = (steady - i128::from(self.since)) * BILLION / rate;
        clamp(i128::from(self.since) + elapsed)
    }

    /// Tells a whole setting from half of one.
    #[must_use]
    pub fn sum(&self) -> u64 {
        let words = [self.offset, self.drift, self.since];
        words.iter().fold(MAGIC, |sum, word| {
            let mixed = (sum ^ u64::from_ne_bytes(word.to_ne_bytes())).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed ^ (mixed >> 29)
        })
    }

    /// Words 1 to 4: what the harness writes at [`SETTING_AT`], in one go.
    #[must_use]
    pub fn encode(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&self.offset.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.drift.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.since.to_ne_bytes());
        bytes[24..].copy_from_slice(&self.sum().to_ne_bytes());
        bytes
    }
}

/// The whole file as a harness makes it: no fault yet.
#[must_use]
pub fn blank() -> Vec<u8> {
    let mut page = vec![0; PAGE_LEN];
    page[..8].copy_from_slice(&MAGIC.to_ne_bytes());
    page[SETTING_AT..SEEN_AT].copy_from_slice(&Setting::default().encode());
    page
}

fn clamp(nanoseconds: i128) -> i64 {
    let bound = if nanoseconds < 0 { i64::MIN } else { i64::MAX };
    i64::try_from(nanoseconds).unwrap_or(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000_000_000;

    #[test]
    fn offset_and_drift_add_up() {
        let setting = Setting {
            offset: -5_000_000_000,
            drift: 1_000_000,
            since: NOW,
        };
        assert_eq!(setting.shown(NOW), NOW - 5_000_000_000);
        let later = NOW + 10_000_000_000;
        assert_eq!(
            setting.shown(later),
            later - 5_000_000_000 + 10_000_000,
            "a millisecond in each second"
        );
        assert_eq!(Setting::default().shown(NOW), NOW);
    }

    #[test]
    fn a_shown_moment_leads_back_to_the_true_one() {
        let drifts = [-999_999_999, -500_000_000, -1, 0, 1, 250_000_000, 4_000_000_000];
        let offsets = [-3_600_000_000_000, 0, 7, 86_400_000_000_000];
        for (drift, offset) in drifts.into_iter().flat_map(|d| offsets.map(|o| (d, o))) {
            let setting = Setting {
                offset,
                drift,
                since: NOW,
            };
            let real = NOW + 12_345_678_901;
            let back = setting.real(setting.shown(real));
            // A clock that nearly stands still shows the same nanosecond for a second.
            let blur = 1_000_000_000 / (1_000_000_000 + drift).min(1_000_000_000) + 1;
            assert!(
                (back - real).abs() <= blur,
                "{setting:?}: {back} instead of {real}"
            );
        }
    }

    #[test]
    fn nothing_overflows() {
        let wild = Setting {
            offset: i64::MAX,
            drift: i64::MAX,
            since: i64::MIN,
        };
        assert_eq!(wild.shown(NOW), i64::MAX);
        let stopped = Setting {
            drift: -1_000_000_000,
            offset: 5,
            since: 0,
        };
        assert_eq!(stopped.real(NOW), NOW - 5);
    }

    #[test]
    fn half_a_setting_has_another_sum() {
        let old = Setting::default();
        let new = Setting {
            offset: 3_600_000_000_000,
            drift: -40,
            since: NOW,
        };
        let half = Setting {
            offset: new.offset,
            ..old
        };
        assert_ne!(half.sum(), old.sum());
        assert_ne!(half.sum(), new.sum());
        assert_eq!(blank().len(), PAGE_LEN);
    }
}
