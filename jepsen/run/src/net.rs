//! The network of a run: who has a place in it, what is wrong with which link, and a [`Fabric`] that makes it so.
//!
//! A fault owns a *layer* of rules; layers add up, so that a partition and a loss can overlap and each is lifted alone.
//! Never here: which rules a nemesis wants (`nemesis`), and how they are made true (`bridge`; `tap` is the other
//! fabric). Invariants: a rule is about one direction; nothing but the namespaces of this run is touched.

pub mod bridge;
mod filter;
pub mod tap;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use palyra_jepsen_switch::Counters;
use tokio::process::Command;
use tokio::sync::Mutex;

/// Who has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Seat {
    /// The harness itself: its clients.
    Clients,
    /// `r1`: a replica, in a namespace of its own.
    Replica(u64),
    /// `h1`: a machine of the fleet, in a namespace of its own.
    Host(u64),
}

impl Seat {
    /// Its address; all are of 10.77.0.0/16.
    #[must_use]
    pub fn address(self) -> String {
        match self {
            Seat::Clients => "10.77.0.1".to_owned(),
            Seat::Replica(id) => format!("10.77.1.{id}"),
            Seat::Host(number) => format!("10.77.2.{number}"),
        }
    }

    /// Whose address that is.
    #[must_use]
    pub fn at(address: &str) -> Option<Seat> {
        let (net, number) = address.strip_prefix("10.77.")?.split_once('.')?;
        let number = number.parse().ok()?;
        match net {
            "0" if number == 1 => Some(Seat::Clients),
            "1" => Some(Seat::Replica(number)),
            "2" => Some(Seat::Host(number)),
            _ => None,
        }
    }

    /// The file of its namespace; the harness is in none of these.
    #[must_use]
    pub fn namespace(self) -> Option<String> {
        (self != Seat::Clients).then(|| format!("/run/netns/{self}"))
    }

    /// What a command is run by to be in that place.
    #[must_use]
    pub fn prefix(self) -> Vec<String> {
        match self.namespace() {
            // Not `ip netns exec`: that changes mounts as well.
            Some(path) => vec!["nsenter".to_owned(), format!("--net={path}"), "--".to_owned()],
            None => Vec::new(),
        }
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Seat::Clients => f.write_str("c1"),
            Seat::Replica(id) => write!(f, "r{id}"),
            Seat::Host(number) => write!(f, "h{number}"),
        }
    }
}

/// What is wrong with one direction of one link. All zero: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Nothing passes.
    pub cut: bool,
    /// So many of a hundred packets are lost.
    pub loss: u32,
    /// TCP segments are answered by a reset.
    pub reset: bool,
    /// Each frame takes so long (`tap` only, as all that follows).
    pub delay_us: u64,
    /// And up to so much longer, at random.
    pub jitter_us: u64,
    /// So many of a hundred frames overtake others.
    pub reorder: u32,
    /// So many of a hundred come twice.
    pub duplicate: u32,
    /// So many of a hundred are damaged.
    pub corrupt: u32,
    /// Damaged frames get a checksum that is right.
    pub fix_checksum: bool,
    /// At most so many bytes pass in a second; 0: any number.
    pub rate: u64,
}

impl Rule {
    /// Nothing passes.
    pub const CUT: Rule = Rule {
        cut: true,
        ..Rule::NONE
    };
    /// Nothing is wrong.
    pub const NONE: Rule = Rule {
        cut: false,
        loss: 0,
        reset: false,
        delay_us: 0,
        jitter_us: 0,
        reorder: 0,
        duplicate: 0,
        corrupt: 0,
        fix_checksum: false,
        rate: 0,
    };

    /// Both rules on one link.
    #[must_use]
    pub fn and(self, other: Rule) -> Rule {
        let rate = match (self.rate, other.rate) {
            (0, rate) | (rate, 0) => rate,
            (one, two) => one.min(two),
        };
        Rule {
            cut: self.cut || other.cut,
            loss: self.loss.max(other.loss),
            reset: self.reset || other.reset,
            delay_us: self.delay_us + other.delay_us,
            jitter_us: self.jitter_us.max(other.jitter_us),
            reorder: self.reorder.max(other.reorder),
            duplicate: self.duplicate.max(other.duplicate),
            corrupt: self.corrupt.max(other.corrupt),
            fix_checksum: self.fix_checksum || other.fix_checksum,
            rate,
        }
    }

    /// Whether only a fabric that forwards frames itself can do it.
    #[must_use]
    pub fn needs_tap(&self) -> bool {
        let plain = Rule {
            cut: self.cut,
            loss: self.loss,
            reset: self.reset,
            ..Rule::NONE
        };
        *self != plain
    }
}

/// A direction: from whom, to whom.
pub type Way = (Seat, Seat);

/// Rules by direction.
pub type Rules = BTreeMap<Way, Rule>;

/// What carries packets between seats.
#[async_trait]
pub trait Fabric: Send + Sync {
    /// `bridge` or `tap`.
    fn name(&self) -> &'static str;

    /// Makes a seat's namespace, if it needs one, and gives it its address.
    async fn attach(&self, seat: Seat) -> Result<()>;

    /// Makes exactly these rules true; what is not in it is whole.
    async fn apply(&self, rules: &Rules) -> Result<()>;

    /// Packets or frames that rules have struck, by direction, since the beginning.
    async fn struck(&self) -> Result<BTreeMap<Way, u64>>;

    /// What became of the frames of each direction, since the beginning; empty where frames pass by themselves.
    async fn frames(&self) -> Result<BTreeMap<Way, Counters>> {
        Ok(BTreeMap::new())
    }
}

/// The network, shared by all nemeses. Cheap to clone.
#[derive(Clone)]
pub struct Net {
    fabric: Option<Arc<dyn Fabric>>,
    layers: Arc<Mutex<Layers>>,
}

#[derive(Default)]
struct Layers {
    next: u64,
    layers: BTreeMap<u64, Rules>,
}

/// Rules that were put up together.
#[derive(Debug)]
#[must_use = "a layer stays until it is lifted"]
pub struct Layer {
    number: u64,
    ways: Vec<Way>,
    before: BTreeMap<Way, u64>,
}

impl Net {
    /// Over a fabric; without one there are only processes on loopback.
    #[must_use]
    pub fn new(fabric: Option<Arc<dyn Fabric>>) -> Net {
        Net {
            fabric,
            layers: Arc::default(),
        }
    }

    /// The fabric's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.fabric.as_ref().map_or("loopback", |fabric| fabric.name())
    }

    /// Whether there is a fabric, so that links can be harmed.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.fabric.is_some()
    }

    /// Gives a seat a place.
    ///
    /// # Errors
    /// When the machine refuses.
    pub async fn attach(&self, seat: Seat) -> Result<()> {
        match &self.fabric {
            Some(fabric) => fabric
                .attach(seat)
                .await
                .with_context(|| format!("{seat} has no place in the network")),
            None => Ok(()),
        }
    }

    fn fabric(&self) -> Result<&Arc<dyn Fabric>> {
        self.fabric
            .as_ref()
            .context("there are no links to harm on loopback; see jepsen doctor")
    }

    /// Puts up rules beside those that there are.
    ///
    /// # Errors
    /// When they can't be made true.
    pub async fn put(&self, rules: Rules) -> Result<Layer> {
        let fabric = self.fabric()?;
        let mut layers = self.layers.lock().await;
        let before = fabric.struck().await?;
        let ways = rules.keys().copied().collect();
        layers.next += 1;
        let number = layers.next;
        layers.layers.insert(number, rules);
        fabric.apply(&layers.sum()).await?;
        Ok(Layer { number, ways, before })
    }

    /// Lifts them. Answers how many packets were struck on their links meanwhile.
    ///
    /// # Errors
    /// When the rest can't be made true.
    pub async fn lift(&self, layer: Layer) -> Result<u64> {
        let fabric = self.fabric()?;
        let mut layers = self.layers.lock().await;
        let after = fabric.struck().await?;
        layers.layers.remove(&layer.number);
        fabric.apply(&layers.sum()).await?;
        let count = |counts: &BTreeMap<Way, u64>, way: &Way| counts.get(way).copied().unwrap_or(0);
        let struck = layer
            .ways
            .iter()
            .map(|way| count(&after, way).saturating_sub(count(&layer.before, way)));
        Ok(struck.sum())
    }

    /// What became of the frames of each direction so far.
    ///
    /// # Errors
    /// When the fabric has failed.
    pub async fn frames(&self) -> Result<BTreeMap<Way, Counters>> {
        self.fabric()?.frames().await
    }

    /// Lifts everything.
    ///
    /// # Errors
    /// When the links can't be made whole.
    pub async fn heal(&self) -> Result<()> {
        let mut layers = self.layers.lock().await;
        layers.layers.clear();
        match &self.fabric {
            Some(fabric) => fabric.apply(&Rules::new()).await,
            None => Ok(()),
        }
    }
}

impl Layers {
    fn sum(&self) -> Rules {
        let mut sum = Rules::new();
        for (way, rule) in self.layers.values().flatten() {
            let entry = sum.entry(*way).or_default();
            *entry = entry.and(*rule);
        }
        sum
    }
}

/// Both directions between two groups get one rule.
#[must_use]
pub fn between(ones: &[Seat], others: &[Seat], rule: Rule) -> Rules {
    let mut rules = Rules::new();
    for one in ones {
        for other in others.iter().filter(|other| *other != one) {
            rules.insert((*one, *other), rule);
            rules.insert((*other, *one), rule);
        }
    }
    rules
}

/// Runs a program to its end, with something on its standard input. Answers what it printed.
///
/// # Errors
/// When it does not start, or fails: with what it said.
pub async fn tool(program: &[&str], input: &str) -> Result<String> {
    use tokio::io::AsyncWriteExt as _;
    let (name, arguments) = program.split_first().context("no program")?;
    let mut command = Command::new(name);
    command
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut child = command
        .spawn()
        .with_context(|| format!("{name} does not start"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}", program.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the rules, and counts ten packets on each link at each look.
    #[derive(Default)]
    struct Paper(std::sync::Mutex<(Rules, BTreeMap<Way, u64>)>);

    #[async_trait]
    impl Fabric for Paper {
        fn name(&self) -> &'static str {
            "paper"
        }
        async fn attach(&self, _: Seat) -> Result<()> {
            Ok(())
        }
        async fn apply(&self, rules: &Rules) -> Result<()> {
            self.0.lock().unwrap().0 = rules.clone();
            Ok(())
        }
        async fn struck(&self) -> Result<BTreeMap<Way, u64>> {
            let mut state = self.0.lock().unwrap();
            let (rules, counts) = &mut *state;
            for way in rules.keys() {
                *counts.entry(*way).or_default() += 10;
            }
            Ok(counts.clone())
        }
    }

    #[tokio::test]
    async fn layers_add_up_and_are_lifted_alone() {
        let fabric = Arc::new(Paper::default());
        let net = Net::new(Some(Arc::clone(&fabric) as Arc<dyn Fabric>));
        let [one, two, three] = [1, 2, 3].map(Seat::Replica);
        let rules = || fabric.0.lock().unwrap().0.clone();
        let cut = net.put(between(&[one], &[two, three], Rule::CUT)).await.unwrap();
        assert_eq!(rules().len(), 4);
        let lossy = Rule {
            loss: 20,
            ..Rule::NONE
        };
        let loss = net.put(between(&[one], &[two], lossy)).await.unwrap();
        assert_eq!(rules()[&(one, two)], Rule { cut: true, ..lossy });
        // Four links of the first layer, two looks since it was put up.
        assert_eq!(net.lift(cut).await.unwrap(), 80);
        assert_eq!(rules().len(), 2);
        assert_eq!(net.lift(loss).await.unwrap(), 20 * 2);
        assert!(rules().is_empty());
    }

    #[test]
    fn an_address_leads_back_to_its_seat() {
        for seat in [Seat::Clients, Seat::Replica(3), Seat::Host(12)] {
            assert_eq!(Seat::at(&seat.address()), Some(seat));
        }
        assert_eq!(
            [Seat::at("10.77.9.1"), Seat::at("10.1.1.1"), Seat::at("x")],
            [None, None, None]
        );
    }

    #[test]
    fn what_only_frames_can_do_is_known() {
        assert!(!Rule::CUT.needs_tap());
        assert!(
            Rule {
                delay_us: 1,
                ..Rule::NONE
            }
            .needs_tap()
        );
        let both = Rule {
            rate: 5,
            ..Rule::NONE
        }
        .and(Rule {
            rate: 3,
            loss: 1,
            ..Rule::NONE
        });
        assert_eq!((both.rate, both.loss), (3, 1));
    }

    #[tokio::test]
    async fn loopback_has_no_links() {
        let error = Net::new(None).put(Rules::new()).await.unwrap_err();
        assert!(error.to_string().contains("doctor"));
    }
}
