//! The seam as a simulation uses it: a process of its own, because hooks are installed once and for ever. One
//! test function, so that nothing runs beside it.
#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use palyra_platform::{self as platform, AbortHandle, Hooks, Instant, IoVerdict, TaskEnded};

#[derive(Default)]
struct World {
    tasks: Mutex<Vec<(Option<u64>, String, AbortHandle)>>,
    deaths: Mutex<Vec<(Option<u64>, String)>>,
    start: OnceLock<Instant>,
}

impl World {
    fn start(&self) -> Instant {
        *self.start.get_or_init(Instant::now)
    }

    fn tasks_of(&self, tag: u64) -> Vec<String> {
        let tasks = self.tasks.lock().unwrap();
        tasks
            .iter()
            .filter(|task| task.0 == Some(tag))
            .map(|task| task.1.clone())
            .collect()
    }
}

impl Hooks for World {
    fn on_spawn(&self, tag: Option<u64>, name: &str, task: AbortHandle) {
        self.tasks.lock().unwrap().push((tag, name.to_owned(), task));
    }
    fn wall_ms(&self, tag: Option<u64>) -> u64 {
        1_000 + tag.unwrap_or(0)
    }
    fn boot_ms(&self, tag: Option<u64>) -> u64 {
        2_000 + tag.unwrap_or(0)
    }
    /// Tag 4 has a clock that goes twice as fast.
    fn to_local(&self, tag: Option<u64>, time: Instant) -> Instant {
        match tag {
            Some(4) => self.start() + 2 * (time - self.start()),
            _ => time,
        }
    }
    fn to_true(&self, tag: Option<u64>, time: Instant) -> Instant {
        match tag {
            Some(4) => self.start() + (time - self.start()) / 2,
            _ => time,
        }
    }
    fn fill_random(&self, tag: Option<u64>, buf: &mut [u8]) {
        buf.fill(tag.unwrap_or(0) as u8);
    }
    fn io_point(&self, _tag: Option<u64>, name: &'static str) -> Option<BoxFuture<'static, IoVerdict>> {
        if name == "test.straight" {
            return None;
        }
        let passage = async move {
            platform::sleep(Duration::from_millis(10)).await;
            if name == "test.crash" {
                IoVerdict::Crash
            } else {
                IoVerdict::Continue
            }
        };
        Some(passage.boxed())
    }
    fn abort(&self, tag: Option<u64>, reason: &str) {
        self.deaths.lock().unwrap().push((tag, reason.to_owned()));
        for (of, _, task) in self.tasks.lock().unwrap().iter() {
            if *of == tag {
                task.abort();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_simulation_holds_tasks_clocks_randomness_and_death() {
    let world: &'static World = Box::leak(Box::default());
    platform::install(world);
    assert!(platform::simulated());

    // Clocks and randomness are those of the tag; the pool and the I/O thread are the same single queue.
    let caller = std::thread::current().id();
    platform::scope(5, async {
        assert_eq!((platform::wall_ms(), platform::boot_ms()), (1_005, 2_005));
        assert_eq!(
            platform::new_ulid_bytes()[..],
            [0, 0, 0, 0, 3, 237, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
        );
        let io = platform::spawn_io("wal", async move { std::thread::current().id() == caller });
        assert_eq!(io.await, Ok(true));
        assert!(platform::blocking(move || std::thread::current().id() == caller).await);
    })
    .await;
    assert_eq!(world.tasks_of(5), ["wal"]);

    // A replica whose clock is too fast waits for less time than it believes, and does not notice.
    let before = Instant::now();
    platform::scope(4, async {
        let began = platform::now();
        platform::sleep(Duration::from_secs(10)).await;
        assert_eq!(platform::now() - began, Duration::from_secs(10));
        assert!(
            platform::timeout(Duration::from_secs(2), std::future::pending::<()>())
                .await
                .is_err()
        );
        assert_eq!(platform::now() - began, Duration::from_secs(12));
        platform::io_point("test.straight").await;
    })
    .await;
    assert_eq!(Instant::now() - before, Duration::from_secs(6));

    // A crash at an I/O point kills the replica's other tasks too, and nobody else's.
    let stranger = platform::scope_sync(2, || platform::spawn(platform::io_point("test.pass")));
    let sibling = platform::scope_sync(1, || platform::spawn(std::future::pending::<()>()));
    let crashing = platform::scope_sync(1, || platform::spawn(platform::io_point("test.crash")));
    assert_eq!(crashing.await, Err(TaskEnded::Aborted));
    assert_eq!(sibling.await, Err(TaskEnded::Aborted));
    assert_eq!(stranger.await, Ok(()));
    assert!(
        world.tasks_of(1)[0].contains("hooks.rs:"),
        "a task is named by its place: {:?}",
        world.tasks_of(1)
    );

    // `abort` unwinds only the replica's own task.
    let aborting = async { platform::abort("fsync failed") };
    let ended: Result<(), _> = platform::scope_sync(3, || platform::spawn(aborting)).await;
    assert!(ended.is_err(), "{ended:?}");
    let deaths = world.deaths.lock().unwrap().clone();
    assert_eq!(
        deaths,
        [
            (Some(1), "test.crash".to_owned()),
            (Some(3), "fsync failed".to_owned())
        ]
    );
}
