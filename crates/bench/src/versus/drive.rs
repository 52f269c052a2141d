//! Load by many clients at once, each with one operation at a time.
//!
//! What never lives here: what an operation is. Invariants: with a rate, operations are due by a schedule that waits
//! for nobody, and each is measured from the moment at which it was due: a stall counts for all that it held back.
//! Without one, the next operation begins when the last one has ended, as clients without a schedule do, and a stall
//! counts once for each client.

use std::future::Future;
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::Round;
use crate::spread::Spread;

/// One client of a system under test.
pub(crate) trait Client: Send + 'static {
    /// One operation, to its answer.
    fn once(&mut self) -> impl Future<Output = Result<()>> + Send;
}

/// Runs all clients for `warm_up` and then for `time`, which counts. Hands the clients back.
pub(crate) async fn round<C: Client>(
    clients: Vec<C>,
    (warm_up, time): (Duration, Duration),
    rate: Option<u32>,
) -> Result<(Vec<C>, Round)> {
    let count = u32::try_from(clients.len()).unwrap_or(u32::MAX).max(1);
    let period = rate.map(|rate| Duration::from_secs_f64(f64::from(count) / f64::from(rate)));
    let begin = Instant::now();
    let span = Span {
        begin,
        counts: begin + warm_up,
        end: begin + warm_up + time,
        period,
    };
    let mut running = JoinSet::new();
    for (number, client) in (0..count).zip(clients) {
        let offset = period.map_or(Duration::ZERO, |period| period * number / count);
        running.spawn(span.clone().run(client, offset));
    }
    let mut clients = Vec::new();
    let mut sum = Round {
        ops: 0,
        failed: 0,
        why: None,
        time,
        spread: Spread::new(),
    };
    for (client, own) in running.join_all().await {
        clients.push(client);
        sum.ops += own.ops;
        sum.failed += own.failed;
        sum.why = sum.why.or(own.why);
        sum.spread.add(&own.spread);
    }
    Ok((clients, sum))
}

#[derive(Debug, Clone)]
struct Span {
    begin: Instant,
    counts: Instant,
    end: Instant,
    period: Option<Duration>,
}

impl Span {
    async fn run<C: Client>(self, mut client: C, offset: Duration) -> (C, Round) {
        let mut own = Round {
            ops: 0,
            failed: 0,
            why: None,
            time: Duration::ZERO,
            spread: Spread::new(),
        };
        let mut due = self.begin + offset;
        loop {
            match self.period {
                Some(period) => {
                    sleep_until(due.min(self.end)).await;
                    if due >= self.end {
                        break;
                    }
                    if Instant::now() >= self.end {
                        own.leave_undone(self.end - due, period);
                        break;
                    }
                    own.take(&mut client, due, &self).await;
                    due += period;
                }
                None => {
                    let now = Instant::now();
                    if now >= self.end {
                        break;
                    }
                    own.take(&mut client, now, &self).await;
                }
            }
        }
        (client, own)
    }
}

impl Round {
    /// What was due and had not begun when the round was over: the schedule asks for more than is done.
    fn leave_undone(&mut self, late: Duration, period: Duration) {
        let missed = late.as_nanos() / period.as_nanos().max(1);
        self.failed += u64::try_from(missed).unwrap_or(u64::MAX).saturating_add(1);
        self.why
            .get_or_insert("was due and had not begun when the round ended: the rate is too high".to_owned());
    }

    /// One operation. It counts when it ended within the time that counts.
    async fn take<C: Client>(&mut self, client: &mut C, due: Instant, span: &Span) {
        let answer = client.once().await;
        let now = Instant::now();
        if now < span.counts || (now >= span.end && span.period.is_none()) {
            return;
        }
        match answer {
            Ok(()) => {
                self.ops += 1;
                self.spread.record(now - due);
            }
            Err(error) => {
                self.failed += 1;
                self.why.get_or_insert(format!("{error:#}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stalls once for half a second; every other operation takes a millisecond.
    struct Stalls(u32);

    impl Client for Stalls {
        async fn once(&mut self) -> Result<()> {
            self.0 += 1;
            let pause = if self.0 == 100 { 500 } else { 1 };
            tokio::time::sleep(Duration::from_millis(pause)).await;
            anyhow::ensure!(self.0 != 7, "the seventh");
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn by_a_schedule_a_stall_counts_for_all_that_it_held_back() {
        let times = (Duration::ZERO, Duration::from_secs(2));
        let (_, closed) = round(vec![Stalls(0)], times, None).await.unwrap();
        let (_, scheduled) = round(vec![Stalls(0)], times, Some(100)).await.unwrap();
        assert_eq!((closed.failed, scheduled.failed), (1, 1));
        assert!(closed.spread.quantile_ms(0.99).unwrap() < 10.0);
        assert!(scheduled.spread.quantile_ms(0.9).unwrap() > 200.0);
        assert_eq!(scheduled.ops, 199);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_that_is_too_high_ends_with_its_round_and_says_what_was_left() {
        let times = (Duration::ZERO, Duration::from_secs(1));
        let began = Instant::now();
        let (_, counted) = round(vec![Stalls(200)], times, Some(10_000)).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(1_100));
        assert!(counted.ops <= 1_001 && counted.failed >= 8_990, "{counted:?}");
        assert!(counted.why.unwrap().contains("rate is too high"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_ends_before_the_round_does_not_count() {
        let times = (Duration::from_millis(500), Duration::from_millis(100));
        let (clients, counted) = round(vec![Stalls(200)], times, None).await.unwrap();
        assert_eq!(clients.len(), 1);
        assert!((90..=101).contains(&counted.ops), "{}", counted.ops);
    }
}
