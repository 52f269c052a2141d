//! The harness's own switch: a TAP device in each namespace, and frames that pass through this process.
//!
//! It forwards a tenth of what the kernel's bridge does, and can delay, reorder, double and damage. What a segment is
//! answered by is not a frame's affair: resets are rules of nftables at the receiver, as on the bridge.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use async_trait::async_trait;
use palyra_jepsen_switch as switch;
use palyra_jepsen_switch::{Counters, Damage, Port, Switch};
use tokio::sync::Mutex;

use super::filter::Filter;
use super::{Fabric, Rule, Rules, Seat, Way, tool};

/// A frame that shall be overtaken is held at least so long: several others must come meanwhile.
const OVERTAKE: Duration = Duration::from_millis(10);
/// A slow link holds so much of what it can send; a router of a home has as much.
const BACKLOG: Duration = Duration::from_millis(500);

/// See the module.
pub struct Tap {
    switch: Switch,
    state: Mutex<State>,
    filter: Filter,
}

#[derive(Default)]
struct State {
    ports: BTreeMap<Seat, Port>,
    /// Links that have a rule.
    ruled: BTreeSet<Way>,
}

impl Tap {
    /// Makes the switch, with the harness at it. Everything is made in this process's namespaces. Chance is the
    /// seed's.
    ///
    /// # Errors
    /// When the machine refuses.
    pub async fn build(seed: u64) -> Result<Tap> {
        tool(
            &["sh", "-c", "set -e\nip link set lo up\nmkdir -p /run/netns"],
            "",
        )
        .await?;
        let switch = Switch::start(seed).context("the switch does not start")?;
        let port = switch.attach(switch::Tap::here("tap0")?);
        let at = Seat::Clients.address();
        let script = format!("set -e\nip addr add {at}/16 dev tap0\nip link set tap0 up");
        tool(&["sh", "-c", &script], "")
            .await
            .context("the harness has no place at the switch")?;
        let mut state = State::default();
        state.ports.insert(Seat::Clients, port);
        Ok(Tap {
            switch,
            state: Mutex::new(state),
            filter: Filter::default(),
        })
    }

    fn healthy(&self) -> Result<()> {
        self.switch.health().map_err(|why| anyhow!(why))
    }
}

#[async_trait]
impl Fabric for Tap {
    fn name(&self) -> &'static str {
        "tap"
    }

    async fn attach(&self, seat: Seat) -> Result<()> {
        let mut state = self.state.lock().await;
        let Some(path) = seat.namespace().filter(|_| !state.ports.contains_key(&seat)) else {
            return Ok(());
        };
        tool(&["ip", "netns", "add", &seat.to_string()], "").await?;
        let tap = switch::Tap::open(path.as_ref(), "eth0")?;
        state.ports.insert(seat, self.switch.attach(tap));
        let at = seat.address();
        let script = format!(
            "set -e\nip -n {seat} link set lo up\nip -n {seat} addr add {at}/16 dev eth0\n\
             ip -n {seat} link set eth0 up\n"
        );
        tool(&["sh", "-c", &script], "").await?;
        self.healthy()
    }

    async fn apply(&self, rules: &Rules) -> Result<()> {
        self.healthy()?;
        let mut state = self.state.lock().await;
        let gone = state.ruled.iter().filter(|way| !rules.contains_key(way));
        let whole = gone.map(|way| (*way, Rule::NONE));
        let all: Vec<(Way, Rule)> = whole
            .chain(rules.iter().map(|(way, rule)| (*way, *rule)))
            .collect();
        for ((from, to), rule) in all {
            let port = |seat| {
                state
                    .ports
                    .get(&seat)
                    .copied()
                    .with_context(|| format!("{seat} has no place"))
            };
            let set = self.switch.set(port(from)?, port(to)?, frames(rule));
            set.map_err(|why| anyhow!("{from} to {to}: {why}"))?;
        }
        state.ruled = rules.keys().copied().collect();
        let resets = rules.iter().filter(|(_, rule)| rule.reset);
        let resets = resets
            .map(|(way, _)| {
                (
                    *way,
                    Rule {
                        reset: true,
                        ..Rule::NONE
                    },
                )
            })
            .collect();
        self.filter.apply(&resets).await
    }

    async fn struck(&self) -> Result<BTreeMap<Way, u64>> {
        let mut struck = self.filter.count().await?;
        for (way, counters) in self.frames().await? {
            *struck.entry(way).or_default() += sum(&counters);
        }
        Ok(struck)
    }

    async fn frames(&self) -> Result<BTreeMap<Way, Counters>> {
        self.healthy()?;
        let state = self.state.lock().await;
        let seats = || state.ports.iter();
        let ways = seats().flat_map(|one| seats().map(move |other| (one, other)));
        let counted = ways
            .filter(|(one, other)| one.0 != other.0)
            .map(|((from, here), (to, there))| {
                let counters = self.switch.counters(*here, *there);
                ((*from, *to), counters)
            });
        Ok(counted.collect())
    }
}

/// Frames to which something was done. Those that were only late count when they came out.
fn sum(counters: &Counters) -> u64 {
    let Counters {
        cut,
        lost,
        reordered,
        duplicated,
        corrupted,
        overflowed,
        slowed,
        ..
    } = *counters;
    cut + lost + reordered + duplicated + corrupted + overflowed + slowed
}

/// A link's rule in the switch's words.
fn frames(rule: Rule) -> switch::Rule {
    let (delay, jitter) = (
        Duration::from_micros(rule.delay_us),
        Duration::from_micros(rule.jitter_us),
    );
    let percent = f64::from;
    let mut made = switch::Rule {
        cut: rule.cut,
        delay,
        jitter,
        reorder: percent(rule.reorder),
        reorder_by: OVERTAKE.max(2 * jitter),
        loss: percent(rule.loss),
        duplicate: percent(rule.duplicate),
        corrupt: percent(rule.corrupt),
        damage: if rule.fix_checksum {
            Damage::Sealed
        } else {
            Damage::Visible
        },
        ..switch::Rule::default()
    };
    if rule.rate > 0 {
        let backlog = u128::from(rule.rate) * BACKLOG.as_millis() / 1_000 / 1_500;
        made.rate = Some(rule.rate);
        made.queue = usize::try_from(backlog)
            .unwrap_or(usize::MAX)
            .clamp(16, switch::rule::QUEUE);
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_of_a_link_is_one_of_the_switch() {
        let rule = Rule {
            delay_us: 25_000,
            jitter_us: 8_000,
            reorder: 20,
            loss: 3,
            rate: 32_000,
            corrupt: 5,
            fix_checksum: true,
            ..Rule::NONE
        };
        let made = frames(rule);
        assert_eq!(made.delay, Duration::from_millis(25));
        assert_eq!(made.reorder_by, Duration::from_millis(16));
        assert_eq!((made.rate, made.queue), (Some(32_000), 16));
        assert_eq!(made.damage, Damage::Sealed);
        assert_eq!(made.check(), Ok(()));
        assert!(frames(Rule::CUT).cut);
        let none = switch::Rule {
            reorder_by: OVERTAKE,
            ..switch::Rule::default()
        };
        assert_eq!(frames(Rule::NONE), none, "nothing is wrong");
    }
}
