//! Lists that come in pages.

use clap::Args;
use palyra_proto::common::v1::{Page, PageInfo};

use crate::failure::Result;
use crate::output::{Source, note};

/// The most entries that are asked for at once.
const PAGE: usize = 1_000;

/// How much of a list is wanted.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Limit {
    /// List at most that many
    #[arg(long, value_name = "COUNT", default_value_t = 10_000)]
    limit: usize,
}

/// One page: entries, what follows, where it comes from.
pub(crate) type Part<T> = (Vec<T>, Option<PageInfo>, Source);

impl Limit {
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn pages(limit: usize) -> (Vec<usize>, usize) {
        let calls = std::cell::Cell::new(0);
        let list = Limit { limit }.all(async |page: Page| {
            calls.set(calls.get() + 1);
            let from: usize = page.after.parse().unwrap_or(0);
            let to = (from + 3).min(8).min(from + page.limit as usize);
            let next = if to < 8 { to.to_string() } else { String::new() };
            Ok(((from..to).collect(), Some(PageInfo { next }), Source::default()))
        });
        (list.await.unwrap().0, calls.get())
    }

    #[tokio::test]
    async fn pages_are_joined_up_to_the_limit() {
        assert_eq!(pages(100).await, ((0..8).collect(), 3));
        assert_eq!(pages(4).await, ((0..4).collect(), 2));
    }
}
