//! Decides, without a search, whether a register that is only read and written, each value once, is linearizable: the
//! method of Gibbons and Korach ("Testing Shared Memories", 1997), in the time that sorting takes.
//!
//! The operations on one value have a *zone*: from the first return among them to the last call among them. If the
//! return comes first, the value certainly was there in between (a forward zone); else it may have been there for a
//! moment only, anywhere in between (a backward zone). A history is linearizable exactly when no two forward zones
//! overlap, no backward zone lies within a forward one, and no read returned before its value was written.
//!
//! A write of unknown outcome that nobody read may have had no effect, and is left out.

use std::collections::BTreeMap;

/// The value that is there at first.
pub const INITIAL: u32 = 0;

/// A read or a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Else a read.
    pub is_write: bool,
    /// What was written or read.
    pub value: u32,
    /// Index of the call.
    pub start: u64,
    /// Index of the return; `None` when nobody knows whether a write took effect.
    pub stop: Option<u64>,
}

/// Which rule is broken, by which values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which.
    pub rule: Rule,
    /// Values by their number.
    pub values: Vec<u32>,
    /// Events that show it: for each value, the first return and the last call; none of the initial value's write.
    pub events: Vec<Option<u64>>,
}

/// What can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A value was read that is not there.
    NotWritten,
    /// A read had returned before its value was written.
    ReadBeforeWrite,
    /// Both values were certainly there at one time.
    Overlap,
    /// While the first value was certainly there the second came and went.
    Within,
}

impl Broken {
    /// For people; `values` are the texts of [`Broken::values`].
    #[must_use]
    pub fn tell(&self, values: &[String]) -> String {
        let name = |at: usize| values.get(at).map_or("?", String::as_str);
        match self.rule {
            Rule::NotWritten => format!("{} was read, and nobody wrote it", name(0)),
            Rule::ReadBeforeWrite => format!("{} was read before it was written", name(0)),
            Rule::Overlap => format!(
                "{} and {} were both there at one time: what was overwritten came back, or was read when it was gone",
                name(0),
                name(1)
            ),
            Rule::Within => format!(
                "{} was there all the while in which {} was written and read",
                name(0),
                name(1)
            ),
        }
    }
}

/// The accesses to one value.
#[derive(Clone, Copy, Debug, Default)]
struct Zone {
    value: u32,
    written: Option<u64>,
    first_return: Option<u64>,
    last_call: u64,
    reads: usize,
}

/// Decides. `None` when a value is written twice, which this method cannot decide.
#[must_use]
pub fn check(accesses: &[Access]) -> Option<Result<(), Broken>> {
    let mut zones: BTreeMap<u32, Zone> = BTreeMap::new();
    // Moments are shifted by one, so that the initial value's write comes before all.
    let initial = Zone {
        value: INITIAL,
        written: Some(0),
        first_return: Some(0),
        ..Zone::default()
    };
    zones.insert(INITIAL, initial);
    for access in accesses {
        let zone = zones.entry(access.value).or_default();
        zone.value = access.value;
        if access.is_write && zone.written.replace(access.start + 1).is_some() {
            return None;
        }
        zone.reads += usize::from(!access.is_write);
        zone.last_call = zone.last_call.max(access.start + 1);
        if let Some(stop) = access.stop {
            let stop = stop + 1;
            zone.first_return = Some(zone.first_return.map_or(stop, |first| first.min(stop)));
        }
    }
    // Without a return there was neither a read nor an acknowledgement.
    let zones: Vec<Zone> = zones
        .into_values()
        .filter(|zone| zone.first_return.is_some())
        .collect();
    Some(judge(&zones))
}

fn judge(zones: &[Zone]) -> Result<(), Broken> {
    let broken = |rule, zones: &[&Zone]| Broken {
        rule,
        values: zones.iter().map(|zone| zone.value).collect(),
        events: zones.iter().flat_map(|zone| zone.events()).collect(),
    };
    for zone in zones {
        let first = zone.first_return.unwrap_or(u64::MAX);
        match zone.written {
            None => return Err(broken(Rule::NotWritten, &[zone])),
            Some(written) if written > first => return Err(broken(Rule::ReadBeforeWrite, &[zone])),
            Some(_) => {}
        }
    }
    let (mut forward, backward): (Vec<&Zone>, Vec<&Zone>) = zones.iter().partition(|zone| zone.is_forward());
    forward.sort_by_key(|zone| zone.first_return);
    for pair in forward.windows(2) {
        if pair[1].first_return < Some(pair[0].last_call) {
            return Err(broken(Rule::Overlap, pair));
        }
    }
    for zone in backward {
        let after = forward.partition_point(|other| other.first_return < Some(zone.last_call));
        let around = after.checked_sub(1).map(|at| forward[at]);
        if let Some(around) = around.filter(|around| Some(around.last_call) > zone.first_return) {
            return Err(broken(Rule::Within, &[around, zone]));
        }
    }
    Ok(())
}

impl Zone {
    fn is_forward(&self) -> bool {
        self.first_return < Some(self.last_call)
    }

    fn events(&self) -> [Option<u64>; 2] {
        let back = |moment: u64| moment.checked_sub(1);
        [self.first_return.and_then(back), back(self.last_call)]
    }
}
