//! Lists that come in pages.

use std::collections::VecDeque;

use clap::Args;
use palyra_proto::common::v1::{Page, PageInfo};

use crate::failure::Result;
use crate::output::{Source, note};

/// The most entries that are asked for at once.
const PAGE: usize = 1_000;

/// How much of a list is wanted.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Limit {
    /// List at most that many; of what has a time, the newest
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = parse_count)]
    limit: usize,
}

/// No limit: what a watch compares, or it would take what a limit pushes out for removed.
pub(crate) const ALL: Limit = Limit { limit: usize::MAX };

fn parse_count(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("write a number, 1 or more".to_owned()),
    }
}

/// One page: entries, what follows, where it comes from.
pub(crate) type Part<T> = (Vec<T>, Option<PageInfo>, Source);

impl Limit {
    /// The number.
    pub(crate) fn count(self) -> usize {
        self.limit
    }

    /// Fetches pages until the list or the limit ends. The source is that of the first page, whose index a
    /// watch can go on from without missing anything.
    pub(crate) async fn all<T, F>(self, fetch: F) -> Result<(Vec<T>, Source)>
    where
        F: AsyncFn(Page) -> Result<Part<T>>,
    {
        let mut items = Vec::new();
        let mut first = None;
        let mut after = String::new();
        loop {
            let limit = PAGE.min(self.limit - items.len());
            let page = Page {
                after,
                limit: u32::try_from(limit).unwrap_or(0),
            };
            let (part, info, source) = fetch(page).await?;
            items.extend(part);
            let source = *first.get_or_insert(source);
            after = info.map(|info| info.next).unwrap_or_default();
            if items.len() >= self.limit && !after.is_empty() {
                note(&format!(
                    "the list goes on; these are the first {}: --limit shows more",
                    items.len()
                ));
                after.clear();
            }
            if after.is_empty() {
                items.truncate(self.limit);
                return Ok((items, source));
            }
        }
    }
}

impl Limit {
    /// The same for lists that come oldest first: fetches all pages, and keeps the newest entries.
    pub(crate) async fn newest<T, F>(self, fetch: F) -> Result<(Vec<T>, Source)>
    where
        F: AsyncFn(Page) -> Result<Part<T>>,
    {
        let mut items = VecDeque::new();
        let mut first = None;
        let mut left_out = 0;
        let mut after = String::new();
        loop {
            let limit = u32::try_from(PAGE).unwrap_or(0);
            let (part, info, source) = fetch(Page { after, limit }).await?;
            let source = *first.get_or_insert(source);
            items.extend(part);
            let excess = items.len().saturating_sub(self.limit);
            left_out += items.drain(..excess).count();
            after = info.map(|info| info.next).unwrap_or_default();
            if after.is_empty() {
                if left_out > 0 {
                    note(&format!(
                        "{left_out} older ones are not shown: --limit shows more"
                    ));
                }
                return Ok((items.into(), source));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight entries in pages of three.
    fn page(page: &Page) -> Result<Part<usize>> {
        let from: usize = page.after.parse().unwrap_or(0);
        let to = (from + 3).min(8).min(from + page.limit as usize);
        let next = if to < 8 { to.to_string() } else { String::new() };
        Ok(((from..to).collect(), Some(PageInfo { next }), Source::default()))
    }

    async fn pages(limit: usize) -> (Vec<usize>, usize) {
        let calls = std::cell::Cell::new(0);
        let list = Limit { limit }.all(async |asked: Page| {
            calls.set(calls.get() + 1);
            page(&asked)
        });
        (list.await.unwrap().0, calls.get())
    }

    #[tokio::test]
    async fn the_newest_are_the_last_of_all_pages() {
        let newest = async |limit| {
            Limit { limit }
                .newest(async |asked: Page| page(&asked))
                .await
                .unwrap()
                .0
        };
        assert_eq!(newest(100).await, (0..8).collect::<Vec<_>>());
        assert_eq!(newest(2).await, [6, 7]);
    }

    #[tokio::test]
    async fn pages_are_joined_up_to_the_limit() {
        assert_eq!(pages(100).await, ((0..8).collect(), 3));
        assert_eq!(pages(4).await, ((0..4).collect(), 2));
    }
}
