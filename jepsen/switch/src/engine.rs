//! The rules at work: frames go in, and come out when they are due. Time is a number that the caller brings, chance
//! comes from a seed, so what happens is a function of what went in.
//!
//! Invariants: a frame leaves in the order of its due time, of equal ones in the order of arrival; a link that neither
//! reorders nor has its rule changed keeps its order; nothing is held that is not bounded by its link's `queue`; each
//! frame that went in is counted once as delivered, cut, lost, overflowed or (while it waits) queued, its copies apart.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::{Add, AddAssign};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::frame::{self, Mac};
use crate::rule::{Damage, Rule};

/// A socket of the switch, counted from 0 in the order in which they were attached.
pub type Port = usize;

/// What became of the frames of one directed link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that were to pass.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that came out, copies included.
    pub delivered: u64,
    /// Stopped because the link was cut, also those under way at that moment.
    pub cut: u64,
    /// Dropped by chance.
    pub lost: u64,
    /// Held back for others to overtake them.
    pub reordered: u64,
    /// Copied.
    pub duplicated: u64,
    /// Damaged.
    pub corrupted: u64,
    /// Dropped because too many were under way.
    pub overflowed: u64,
    /// Came out later than they went in, because of a delay, jitter, a rate, or to be overtaken.
    pub slowed: u64,
    /// Nanoseconds that delivered frames were held, in total.
    pub held_ns: u64,
    /// Nanoseconds by which the worst delivery was later than it was due: the machine's fault, not the rule's.
    pub late_ns_max: u64,
}

impl Counters {
    /// How long a delivered frame was held on average.
    #[must_use]
    pub fn held_mean(&self) -> Duration {
        Duration::from_nanos(self.held_ns.checked_div(self.delivered).unwrap_or(0))
    }

    /// What happened since an earlier reading; the worst lateness is that of all time.
    #[must_use]
    pub fn since(&self, earlier: &Counters) -> Counters {
        Counters {
            frames: self.frames - earlier.frames,
            bytes: self.bytes - earlier.bytes,
            delivered: self.delivered - earlier.delivered,
            cut: self.cut - earlier.cut,
            lost: self.lost - earlier.lost,
            reordered: self.reordered - earlier.reordered,
            duplicated: self.duplicated - earlier.duplicated,
            corrupted: self.corrupted - earlier.corrupted,
            overflowed: self.overflowed - earlier.overflowed,
            slowed: self.slowed - earlier.slowed,
            held_ns: self.held_ns - earlier.held_ns,
            late_ns_max: self.late_ns_max,
        }
    }
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Counters) {
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.delivered += other.delivered;
        self.cut += other.cut;
        self.lost += other.lost;
        self.reordered += other.reordered;
        self.duplicated += other.duplicated;
        self.corrupted += other.corrupted;
        self.overflowed += other.overflowed;
        self.slowed += other.slowed;
        self.held_ns += other.held_ns;
        self.late_ns_max = self.late_ns_max.max(other.late_ns_max);
    }
}

impl Add for Counters {
    type Output = Counters;

    fn add(mut self, other: Counters) -> Counters {
        self += other;
        self
    }
}

/// A directed link between two ports.
#[derive(Clone, Default)]
struct Link {
    rule: Rule,
    counters: Counters,
    /// Frames under way.
    queued: usize,
    /// When the sender has put the last bit on a link with a rate.
    busy_until: u64,
    /// When the last frame that keeps the order arrives.
    last_due: u64,
}

/// A frame under way. Ordered by when it is due, then by when it came.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due: u64,
    sequence: u64,
    arrived: u64,
    from: Port,
    to: Port,
    frame: Vec<u8>,
}

/// A frame that has to be put out now.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Through which port.
    pub to: Port,
    /// What.
    pub frame: Vec<u8>,
}

/// The switch as data.
pub struct Engine {
    ports: usize,
    /// Row `from`, column `to`; grown with the ports.
    links: Vec<Vec<Link>>,
    held: BinaryHeap<Reverse<Held>>,
    learned: HashMap<Mac, Port>,
    sequence: u64,
    chance: SmallRng,
}

impl Engine {
    /// A switch without ports.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Engine {
            ports: 0,
            links: Vec::new(),
            held: BinaryHeap::new(),
            learned: HashMap::new(),
            sequence: 0,
            chance: SmallRng::seed_from_u64(seed),
        }
    }

    /// One port more; its links let everything through.
    pub fn attach(&mut self) -> Port {
        let port = self.ports;
        self.ports += 1;
        for row in &mut self.links {
            row.push(Link::default());
        }
        self.links.push(vec![Link::default(); self.ports]);
        port
    }

    /// How many ports there are.
    #[must_use]
    pub fn ports(&self) -> usize {
        self.ports
    }

    /// Sets the rule of a directed link. Frames under way keep the time that they were given, but a cut stops them.
    ///
    /// # Errors
    /// The rule makes no sense, or there is no such port.
    pub fn set(&mut self, from: Port, to: Port, rule: Rule) -> Result<(), String> {
        rule.check()?;
        let ports = self.ports;
        let link = self.links.get_mut(from).and_then(|row| row.get_mut(to));
        let link =
            link.ok_or_else(|| format!("no link from port {from} to {to}: there are {ports} ports"))?;
        // A backlog of a slower time must not go on after it.
        if rule.rate.is_none() {
            link.busy_until = 0;
        }
        link.rule = rule;
        Ok(())
    }

    /// The rule of a directed link; the default for ports that are not there.
    #[must_use]
    pub fn rule(&self, from: Port, to: Port) -> Rule {
        let link = self.links.get(from).and_then(|row| row.get(to));
        link.map(|link| link.rule).unwrap_or_default()
    }

    /// What became of the frames of a directed link so far.
    #[must_use]
    pub fn counters(&self, from: Port, to: Port) -> Counters {
        let link = self.links.get(from).and_then(|row| row.get(to));
        link.map(|link| link.counters).unwrap_or_default()
    }

    /// Of all links together.
    #[must_use]
    pub fn total(&self) -> Counters {
        let links = self.links.iter().flatten();
        links.fold(Counters::default(), |sum, link| sum + link.counters)
    }

    /// A frame came in at a port, at `now` nanoseconds.
    pub fn accept(&mut self, now: u64, from: Port, frame: &[u8]) {
        let Some((to, source)) = frame::addresses(frame).filter(|_| from < self.ports) else {
            return;
        };
        if !frame::is_group(source) {
            self.learned.insert(source, from);
        }
        match self.learned.get(&to).filter(|_| !frame::is_group(to)) {
            Some(&port) if port == from => {}
            Some(&port) => self.pass(now, from, port, frame),
            None => {
                for port in (0..self.ports).filter(|port| *port != from) {
                    self.pass(now, from, port, frame);
                }
            }
        }
    }

    fn draw(&mut self, percent: f64) -> bool {
        percent > 0.0 && self.chance.gen_range(0.0..100.0) < percent
    }

    fn pass(&mut self, now: u64, from: Port, to: Port, frame: &[u8]) {
        let link = &mut self.links[from][to];
        link.counters.frames += 1;
        link.counters.bytes += frame.len() as u64;
        let rule = link.rule;
        if rule.cut {
            link.counters.cut += 1;
            return;
        }
        if self.draw(rule.loss) {
            self.links[from][to].counters.lost += 1;
            return;
        }
        let copies = 1 + usize::from(self.draw(rule.duplicate));
        for copy in 0..copies {
            if self.links[from][to].queued >= rule.queue {
                self.links[from][to].counters.overflowed += 1;
                continue;
            }
            self.links[from][to].counters.duplicated += u64::from(copy > 0);
            let mut bytes = frame.to_vec();
            self.damage(from, to, &mut bytes);
            let due = self.due(now, from, to, bytes.len());
            self.links[from][to].queued += 1;
            self.sequence += 1;
            self.held.push(Reverse(Held {
                due,
                sequence: self.sequence,
                arrived: now,
                from,
                to,
                frame: bytes,
            }));
        }
    }

    fn damage(&mut self, from: Port, to: Port, bytes: &mut [u8]) {
        let rule = self.links[from][to].rule;
        if self.draw(rule.corrupt) {
            let draw = self.chance.r#gen();
            let damaged = match rule.damage {
                Damage::Visible => frame::damage(bytes, draw),
                Damage::Sealed => frame::damage_sealed(bytes, draw),
            };
            self.links[from][to].counters.corrupted += u64::from(damaged);
        }
    }

    /// When a frame of that length arrives: the link sends one after the other at its rate, then it travels.
    fn due(&mut self, now: u64, from: Port, to: Port, length: usize) -> u64 {
        let rule = self.links[from][to].rule;
        let jitter = nanoseconds(rule.jitter);
        let travels = nanoseconds(rule.delay)
            + if jitter > 0 {
                self.chance.gen_range(0..=jitter)
            } else {
                0
            };
        let overtaken = self.draw(rule.reorder);
        let link = &mut self.links[from][to];
        let sent = match rule.rate {
            Some(rate) => {
                let takes = (length as u128 * 1_000_000_000 / u128::from(rate)) as u64;
                link.busy_until = link.busy_until.max(now) + takes;
                link.busy_until
            }
            None => now,
        };
        let due = sent + travels;
        if overtaken {
            link.counters.reordered += 1;
            return due + nanoseconds(rule.reorder_by);
        }
        // Without a fault, a frame must not wait for those that were given more time by a rule that is over.
        if rule.delay.is_zero() && rule.jitter.is_zero() && rule.rate.is_none() {
            return due;
        }
        link.last_due = link.last_due.max(due);
        link.last_due
    }

    /// When the next frame is due; `None` when nothing is under way.
    #[must_use]
    pub fn next_due(&self) -> Option<u64> {
        self.held.peek().map(|Reverse(held)| held.due)
    }

    /// Takes the next frame that is due at `now`. Ask until there is none.
    pub fn take(&mut self, now: u64) -> Option<Delivery> {
        while self.next_due().is_some_and(|due| due <= now) {
            let Reverse(held) = self.held.pop()?;
            let link = &mut self.links[held.from][held.to];
            link.queued -= 1;
            if link.rule.cut {
                link.counters.cut += 1;
                continue;
            }
            link.counters.delivered += 1;
            link.counters.slowed += u64::from(held.due > held.arrived);
            link.counters.held_ns += now - held.arrived.min(now);
            link.counters.late_ns_max = link.counters.late_ns_max.max(now - held.due);
            return Some(Delivery {
                to: held.to,
                frame: held.frame,
            });
        }
        None
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}
