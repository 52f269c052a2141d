//! The bytes of one file, in pages that two images of the file system may share.
//!
//! Never here: names, durability, faults. A page that is not there reads as zeros and takes no space.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a page: what the kernel's page cache and most disks write at once.
pub(crate) const PAGE: u64 = 4096;

/// A sparse array of bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Content {
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
    size: u64,
}

/// The part of a range of bytes that lies in one page.
pub(crate) struct Piece {
    /// The page's number.
    pub(crate) page: u64,
    /// Where the piece begins in the page.
    pub(crate) at: usize,
    /// The piece within the range of bytes it was cut from.
    pub(crate) of: Range<usize>,
}

/// Cuts `len` bytes at `offset` at the bounds of pages.
pub(crate) fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let position = offset + done as u64;
        let at = (position % PAGE) as usize;
        let take = (PAGE as usize - at).min(len - done);
        let of = done..done + take;
        done += take;
        Some(Piece {
            page: position / PAGE,
            at,
            of,
        })
    })
}

impl Content {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that are really there.
    pub(crate) fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Bytes that a write of `len` bytes at `offset` would add to [`Content::allocated`].
    pub(crate) fn growth(&self, offset: u64, len: usize) -> u64 {
        let new = pieces(offset, len).filter(|piece| !self.pages.contains_key(&piece.page));
        new.count() as u64 * PAGE
    }

    /// At most `len` bytes from `offset`; fewer at the end.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let left = self.size.saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        let mut bytes = vec![0; len];
        for piece in pieces(offset, len) {
            if let Some(page) = self.pages.get(&piece.page) {
                let end = piece.at + piece.of.len();
                bytes[piece.of].copy_from_slice(&page[piece.at..end]);
            }
        }
        bytes
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for piece in pieces(offset, bytes.len()) {
            let page = self
                .pages
                .entry(piece.page)
                .or_insert_with(|| Arc::new([0; PAGE as usize]));
            let end = piece.at + piece.of.len();
            Arc::make_mut(page)[piece.at..end].copy_from_slice(&bytes[piece.of]);
        }
        self.size = self.size.max(offset + bytes.len() as u64);
    }

    /// Cuts or extends with zeros.
    pub(crate) fn resize(&mut self, size: u64) {
        if size < self.size {
            self.pages.split_off(&size.div_ceil(PAGE));
            let rest = size % PAGE;
            if rest != 0
                && let Some(page) = self.pages.get_mut(&(size / PAGE))
            {
                Arc::make_mut(page)[rest as usize..].fill(0);
            }
        }
        self.size = size;
    }

    /// Zeros in `offset..offset + len`, within the present size; whole pages are given back.
    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        let touched: Vec<u64> = self
            .pages
            .range(offset / PAGE..end.div_ceil(PAGE).max(offset / PAGE))
            .map(|(page, _)| *page)
            .collect();
        for number in touched {
            let from = offset.max(number * PAGE) - number * PAGE;
            let to = end.min((number + 1) * PAGE) - number * PAGE;
            if from == 0 && to == PAGE {
                self.pages.remove(&number);
            } else if let Some(page) = self.pages.get_mut(&number)
                && from < to
            {
                Arc::make_mut(page)[from as usize..to as usize].fill(0);
            }
        }
    }

    /// Takes over the pages under `offset..offset + len` as they are in `other`, without a copy, and a size
    /// that reaches to their end, as far as `other` does.
    pub(crate) fn share(&mut self, other: &Content, offset: u64, len: usize) {
        for piece in pieces(offset, len) {
            match other.pages.get(&piece.page) {
                Some(page) => self.pages.insert(piece.page, page.clone()),
                None => self.pages.remove(&piece.page),
            };
        }
        self.size = self.size.max((offset + len as u64).min(other.size));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The same content, as simply as it can be said.
    fn plain(content: &Content) -> Vec<u8> {
        content.read(0, usize::MAX)
    }

    #[test]
    fn holes_read_as_zeros_and_take_no_space() {
        let mut content = Content::default();
        content.write(3 * PAGE + 5, b"abc");
        assert_eq!(content.allocated(), PAGE);
        assert_eq!(content.size(), 3 * PAGE + 8);
        assert_eq!(content.read(3 * PAGE + 4, 100), b"\0abc");
        assert_eq!(content.read(content.size(), 1), b"");
    }

    #[test]
    fn what_was_cut_off_does_not_come_back() {
        let mut content = Content::default();
        content.write(0, &[7; 5000]);
        content.resize(10);
        content.resize(5000);
        let mut expected = vec![7; 10];
        expected.resize(5000, 0);
        assert_eq!(plain(&content), expected);
    }

    #[test]
    fn a_hole_gives_whole_pages_back() {
        let mut content = Content::default();
        content.write(0, &[7; 3 * PAGE as usize]);
        content.zero(10, 2 * PAGE);
        let mut expected = vec![7; 3 * PAGE as usize];
        expected[10..10 + 2 * PAGE as usize].fill(0);
        assert_eq!(plain(&content), expected);
        assert_eq!(content.allocated(), 2 * PAGE);
    }

    #[test]
    fn images_share_pages_until_one_writes() {
        let mut one = Content::default();
        one.write(0, &[1; 2 * PAGE as usize]);
        let mut two = Content::default();
        two.share(&one, 10, 1);
        assert_eq!((two.size(), two.allocated()), (11, PAGE));
        one.write(0, &[2]);
        assert_eq!(two.read(0, 2), [1, 1]);
    }
}
