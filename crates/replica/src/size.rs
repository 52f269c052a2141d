//! How many bytes the log holds, well enough to keep it within a limit.
//!
//! Commands may be large: a log that is kept by number of entries alone could fill the disk. Sizes are
//! counted from the start of the process in coarse steps; what was there before counts as nothing until it is
//! purged by number.

use std::collections::VecDeque;

/// Bytes between two marks: the precision of everything here.
const STEP: u64 = 4 * 1024 * 1024;

/// Marks of how much had been appended up to an index.
#[derive(Debug, Default)]
pub(crate) struct LogSize {
    /// Index and bytes appended up to it; both rise.
    marks: VecDeque<(u64, u64)>,
    appended: u64,
    purged: u64,
}

impl LogSize {
    pub(crate) fn append(&mut self, index: u64, bytes: usize) {
        self.appended += bytes as u64;
        let last = self.marks.back().map_or(self.purged, |mark| mark.1);
        if self.appended - last >= STEP {
            self.marks.push_back((index, self.appended));
        }
    }

    pub(crate) fn truncate(&mut self, from: u64) {
        while self.marks.back().is_some_and(|mark| mark.0 >= from) {
            self.marks.pop_back();
        }
        // Up to one step too much: it is purged a little early.
        self.appended = self.marks.back().map_or(self.purged, |mark| mark.1);
    }

    pub(crate) fn purge(&mut self, upto: u64) {
        while let Some((_, bytes)) = self.marks.pop_front_if(|mark| mark.0 <= upto) {
            self.purged = bytes;
        }
    }

    /// When the log is over `limit`: the index up to which it must go, so that half of it is left.
    pub(crate) fn excess(&self, limit: u64) -> Option<u64> {
        if self.appended - self.purged <= limit {
            return None;
        }
        let enough = self.appended.saturating_sub(limit / 2);
        self.marks
            .iter()
            .take_while(|mark| mark.1 <= enough)
            .last()
            .map(|mark| mark.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_is_too_large_is_halved() {
        let mut size = LogSize::default();
        let entry = 1024 * 1024;
        for index in 1..=100 {
            size.append(index, entry);
        }
        assert_eq!(size.excess(100 * entry as u64), None);
        let upto = size.excess(60 * entry as u64).expect("100 MiB are over 60");
        assert!((64..=72).contains(&upto), "{upto}");
        size.purge(upto);
        assert_eq!(size.excess(60 * entry as u64), None);
        size.truncate(81);
        for index in 81..=200 {
            size.append(index, entry);
        }
        assert!(size.excess(60 * entry as u64).is_some_and(|upto| upto > 150));
    }
}
