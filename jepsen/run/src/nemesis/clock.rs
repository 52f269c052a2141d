//! Wrong wall clocks: one that jumps, one that runs fast or slow, one that flickers, and one by which every
//! certificate has expired. Clocks since boot stay true.
//!
//! Nothing that Palyra promises may depend on a wall clock, so no verdict may change under these.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use tokio::task::JoinHandle;

use super::{Evidence, Fault, Kind, Nemesis, Scene};
use crate::abilities::Ability;
use crate::chance::Chance;
use crate::clock::{Seen, Setting, Wall, true_time};
use crate::door::{Identity, Miss};
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

const NEEDS: &[Ability] = &[Ability::Skew];
const SECOND: i64 = 1_000_000_000;
/// Further than certificates are valid, a year at most, and well within the life of a root.
const EXPIRED: i64 = 400 * 24 * 3_600 * SECOND;
/// What a replica answers to whose certificate has expired.
const HAS_EXPIRED: &str = "E0305";
/// How long one try lasts of a replica that is to refuse a certificate.
const TRY: Duration = Duration::from_secs(2);

macro_rules! kind {
    ($name:literal, $all:expr, $how:expr, $does:literal) => {
        Kind {
            name: $name,
            argument: None,
            does: $does,
            needs: NEEDS,
            all: $all,
            make: |_| {
                Ok(Box::new(Clock {
                    name: $name,
                    how: $how,
                }))
            },
        }
    };
}

pub(super) const KINDS: &[Kind] = &[
    kind!(
        "clock:jump",
        Some(""),
        How::Jump,
        "wall clocks jump by up to an hour, and back"
    ),
    kind!(
        "clock:skew",
        Some(""),
        How::Skew,
        "wall clocks gain or lose up to half a second in each second"
    ),
    kind!(
        "clock:strobe",
        Some(""),
        How::Strobe,
        "wall clocks jump to and fro many times a second"
    ),
    kind!(
        "cert-expire",
        None,
        How::Expire,
        "a follower's wall clock is so far ahead that every certificate has expired"
    ),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Jump,
    Skew,
    Strobe,
    Expire,
}

struct Clock {
    name: &'static str,
    how: How,
}

/// What was drawn: nanoseconds of offset, or of drift in each second; between two flickers of a strobe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Drawn {
    amount: i64,
    pause_ms: u64,
}

impl Drawn {
    fn draw(how: How, chance: &mut Chance) -> Drawn {
        let sign = if chance.percent(50) { 1 } else { -1 };
        // Small ones upset timeouts, large ones certificates and deadlines.
        let jump_ms = match chance.below(3) {
            0 => chance.between(50, 2_000),
            1 => chance.between(2_000, 60_000),
            _ => chance.between(60_000, 3_600_000),
        };
        let milli = |ms: u64| i64::try_from(ms).unwrap_or(0) * 1_000_000;
        let amount = match how {
            How::Jump | How::Strobe => sign * milli(jump_ms),
            How::Skew => sign * milli(chance.between(1, 500)),
            How::Expire => EXPIRED,
        };
        let pause_ms = if how == How::Strobe {
            chance.between(5, 200)
        } else {
            0
        };
        Drawn { amount, pause_ms }
    }

    fn read(text: &str) -> Result<Drawn> {
        let wrong = || format!("{text:?} is no draw of a clock: it is NANOSECONDS/MILLISECONDS");
        let (amount, pause) = text.split_once('/').with_context(wrong)?;
        Ok(Drawn {
            amount: amount.parse().with_context(wrong)?,
            pause_ms: pause.parse().with_context(wrong)?,
        })
    }

    /// The clock of the `place`-th replica that is struck: when all are, they must not agree.
    fn setting(self, how: How, place: usize, now: i64) -> Setting {
        let odd = i64::try_from(place % 2).unwrap_or(0);
        let amount = if how == How::Expire {
            self.amount
        } else {
            self.amount * (1 - 2 * odd)
        };
        match how {
            How::Skew => Setting {
                drift: amount,
                since: now,
                ..Setting::default()
            },
            How::Jump | How::Strobe | How::Expire => Setting {
                offset: amount,
                ..Setting::default()
            },
        }
    }
}

#[async_trait]
impl Nemesis for Clock {
    fn name(&self) -> &str {
        self.name
    }

    fn targets(&self) -> &'static [Target] {
        match self.how {
            // What a leader stamps is the cluster's time for good, and its certificates would all have expired.
            How::Expire => &[Target::Follower],
            _ => &[Target::One, Target::Leader, Target::Minority, Target::All],
        }
    }

    fn lasts(&self) -> (Duration, Duration) {
        (Duration::from_secs(1), Duration::from_secs(10))
    }

    fn draw(&self, chance: &mut Chance, _: &Scene) -> String {
        let drawn = Drawn::draw(self.how, chance);
        format!("{}/{}", drawn.amount, drawn.pause_ms)
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let drawn = Drawn::read(&step.draw)?;
        let now = true_time();
        let mut wrong = BTreeMap::new();
        for (place, id) in targets.iter().enumerate() {
            let wall = run.cluster.clocks().wall(*id)?;
            let before = wall.seen()?;
            let setting = drawn.setting(self.how, place, now);
            wrong.insert(
                *id,
                Moved {
                    wall,
                    before,
                    setting,
                },
            );
        }
        ensure!(!wrong.is_empty(), "nobody is struck");
        for moved in wrong.values() {
            moved.wall.set(moved.setting)?;
        }
        let flicker = (self.how == How::Strobe).then(|| flicker(&wrong, drawn.pause_ms));
        let refused = match self.how {
            How::Expire => Some(tokio::spawn(refusals(Arc::clone(run), targets.to_vec()))),
            _ => None,
        };
        Ok(Box::new(Wrong {
            how: self.how,
            wrong,
            flicker,
            refused,
        }))
    }
}

/// A clock that was moved.
struct Moved {
    wall: Wall,
    before: Seen,
    setting: Setting,
}

struct Wrong {
    how: How,
    wrong: BTreeMap<u64, Moved>,
    flicker: Option<JoinHandle<Result<u64>>>,
    refused: Option<JoinHandle<BTreeMap<u64, String>>>,
}

/// Moves clocks to and fro until the task is ended; they are true when the fault has ended.
fn flicker(wrong: &BTreeMap<u64, Moved>, pause_ms: u64) -> JoinHandle<Result<u64>> {
    let clocks: Vec<(Wall, Setting)> = wrong
        .values()
        .map(|moved| (moved.wall.clone(), moved.setting))
        .collect();
    tokio::spawn(async move {
        for turn in 1.. {
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            for (wall, setting) in &clocks {
                wall.set(if turn % 2 == 0 {
                    *setting
                } else {
                    Setting::default()
                })?;
            }
        }
        Ok(0)
    })
}

/// Comes to each replica with the operator's certificate until it is refused. Answers what each said, if it refused.
async fn refusals(run: Arc<Run>, targets: Vec<u64>) -> BTreeMap<u64, String> {
    let mut refused = BTreeMap::new();
    let Ok(identity) = run
        .cluster
        .operator()
        .and_then(|credential| Identity::of(&credential))
    else {
        return refused;
    };
    while refused.len() < targets.len() {
        for id in &targets {
            let until = tokio::time::Instant::now() + TRY;
            match knock(&run.cluster.door(*id, &identity), until).await {
                Err(Miss::Refused(why)) => drop(refused.insert(*id, why)),
                Err(Miss::Answered(error)) if error.code == HAS_EXPIRED => {
                    drop(refused.insert(*id, error.to_string()));
                }
                _ => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    refused
}

/// A connection and one question on it: with TLS 1.3 a client hears only then that its certificate was refused.
async fn knock(door: &crate::door::Door, until: tokio::time::Instant) -> Result<(), Miss> {
    use palyra_proto::cluster::v1::{StatusRequest, cluster_service_client::ClusterServiceClient};
    let within = until.saturating_duration_since(tokio::time::Instant::now());
    door.call(within, |channel| async move {
        ClusterServiceClient::new(channel)
            .status(StatusRequest::default())
            .await
    })
    .await
    .map(|_| ())
}

#[async_trait]
impl Fault for Wrong {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        if let Some(flicker) = &self.flicker {
            flicker.abort();
        }
        let (mut happened, mut seen) = (true, Vec::new());
        for (id, moved) in &self.wrong {
            let now = moved.wall.seen()?;
            let told = shown(moved, now, true_time());
            happened &= told.happened;
            seen.push(format!("r{id} {}", told.seen));
            moved.wall.set(Setting::default())?;
        }
        if let Some(flicker) = self.flicker {
            // It may have been in the middle of a turn.
            let _ = flicker.await;
            self.wrong
                .values()
                .try_for_each(|moved| moved.wall.set(Setting::default()))?;
        }
        if let Some(refused) = self.refused {
            seen.push(who_refused(run, refused, &mut happened).await);
        }
        debug_assert!(self.how != How::Expire || seen.len() > self.wrong.len());
        Ok(Evidence::when(happened, seen.join("; ")))
    }
}

/// What the shim of one replica has told since its clock was moved.
fn shown(moved: &Moved, now: Seen, real: i64) -> Evidence {
    let looks = now.reads.saturating_sub(moved.before.reads);
    if looks == 0 {
        return Evidence::when(false, "never looked at its wall clock");
    }
    let off = (now.shown - real) as f64 / SECOND as f64;
    Evidence::when(
        true,
        format!("looked {looks} times at a clock that was {off:+.1} s off at last"),
    )
}

/// Whether the replica that finds everything expired has refused a certificate. A replica that has ended refuses
/// nobody.
async fn who_refused(
    run: &Arc<Run>,
    refused: JoinHandle<BTreeMap<u64, String>>,
    happened: &mut bool,
) -> String {
    if !refused.is_finished() {
        refused.abort();
        *happened = false;
        let up = run.cluster.up();
        return format!("nobody was refused a connection (replicas that run: {up:?})");
    }
    let told = refused.await.unwrap_or_default();
    let words = told
        .iter()
        .map(|(id, why)| format!("r{id} refused the operator: {why}"));
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_within_bounds_and_survive_a_plan() {
        let scene = Scene {
            replicas: vec![1, 2, 3],
            hosts: 0,
        };
        let mut directions = std::collections::BTreeSet::new();
        for kind in KINDS {
            let nemesis = (kind.make)("").unwrap();
            for seed in 0..200 {
                let text = nemesis.draw(&mut Chance::of(seed), &scene);
                let drawn = Drawn::read(&text).unwrap();
                assert_eq!(format!("{}/{}", drawn.amount, drawn.pause_ms), text);
                directions.insert((kind.name, drawn.amount > 0));
                let bound = match kind.name {
                    "clock:skew" => SECOND / 2,
                    "cert-expire" => EXPIRED,
                    _ => 3_600 * SECOND,
                };
                assert!(
                    drawn.amount != 0 && drawn.amount.abs() <= bound,
                    "{} drew {text}",
                    kind.name
                );
            }
        }
        assert_eq!(directions.len(), 7, "all but the last go both ways");
        assert!(Drawn::read("fast").is_err() && Drawn::read("1/x").is_err());
    }

    #[test]
    fn when_all_are_struck_they_do_not_agree() {
        let drawn = Drawn {
            amount: 5 * SECOND,
            pause_ms: 0,
        };
        let settings: Vec<Setting> = (0..3).map(|place| drawn.setting(How::Jump, place, 7)).collect();
        assert_eq!(settings[0].offset, 5 * SECOND);
        assert_eq!(settings[1].offset, -5 * SECOND);
        let skewed = drawn.setting(How::Skew, 1, 7);
        assert_eq!((skewed.offset, skewed.drift, skewed.since), (0, -5 * SECOND, 7));
    }

    #[test]
    fn a_clock_that_nobody_looked_at_is_no_fault() {
        let folder = tempfile::tempdir().unwrap();
        let wall = Wall::create(&folder.path().join("page")).unwrap();
        let before = Seen {
            reads: 9,
            shown: 1,
            processes: 1,
        };
        let moved = Moved {
            wall,
            before,
            setting: Setting::default(),
        };
        assert!(!shown(&moved, before, 1).happened);
        let later = Seen {
            reads: 12,
            shown: 3 * SECOND,
            processes: 1,
        };
        let told = shown(&moved, later, SECOND);
        assert!(
            told.happened && told.seen.contains("looked 3 times") && told.seen.contains("+2.0 s"),
            "{}",
            told.seen
        );
    }
}
