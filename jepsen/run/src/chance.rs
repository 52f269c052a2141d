//! Chance that a seed decides: the same numbers on every machine and with every version of a library.
//!
//! Everything that a run draws (plan, targets, keys, operations) comes from here. Not for secrets.

/// A stream of numbers (SplitMix64, Steele and others 2014).
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// The stream of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Chance {
        Chance(seed)
    }

    /// An own stream for something with a name, so that drawing more in one place changes nothing in another.
    #[must_use]
    pub fn named(seed: u64, name: &str) -> Chance {
        // FNV-1a; the first number of a stream is mixed well, so that near seeds are far apart.
        let mixed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut chance = Chance(seed ^ mixed);
        Chance(chance.number())
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to below `limit`; 0 when that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        let wide = u128::from(self.number()) * u128::from(limit);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// A place in a list of that length.
    pub fn place(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }

    /// From `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// True that often in a hundred.
    pub fn percent(&mut self, often: u64) -> bool {
        self.below(100) < often
    }

    /// One of a list.
    ///
    /// # Panics
    /// When the list is empty.
    pub fn one<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.place(list.len())]
    }

    /// Puts a list into an order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for end in (1..list.len()).rev() {
            list.swap(end, self.place(end + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_and_a_name_makes_another_stream() {
        let take = |mut chance: Chance| (0..8).map(|_| chance.number()).collect::<Vec<_>>();
        assert_eq!(take(Chance::of(7)), take(Chance::of(7)));
        assert_ne!(take(Chance::of(7)), take(Chance::of(8)));
        assert_ne!(take(Chance::named(7, "plan")), take(Chance::named(7, "keys")));
        // The stream is part of what a seed means: it must not change.
        assert_eq!(Chance::of(0).number(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn numbers_stay_in_their_bounds_and_reach_them() {
        let mut chance = Chance::of(1);
        let drawn: Vec<u64> = (0..1_000).map(|_| chance.between(3, 6)).collect();
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&3), Some(&6)));
        assert_eq!(chance.below(0), 0);
        let mut list: Vec<u32> = (0..50).collect();
        chance.shuffle(&mut list);
        assert_ne!(list, (0..50).collect::<Vec<_>>());
        list.sort_unstable();
        assert_eq!(list, (0..50).collect::<Vec<_>>());
    }
}
