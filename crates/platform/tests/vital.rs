//! What a panic in a vital task does to the process. The test runs its own binary again as the victim, because the
//! victim dies.
#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// Tells the binary that it is the victim.
const VICTIM: &str = "PALYRA_PLATFORM_VICTIM";

#[tokio::test]
async fn victim() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    let core = palyra_platform::spawn(palyra_platform::vital("the core", async {
        tokio::task::yield_now().await;
        panic!("an index that is not there");
    }));
    // An ordinary task's panic would be told here, and the process would go on.
    let ended: Result<(), _> = core.await;
    println!("survived: {ended:?}");
}

#[test]
fn a_panic_in_a_vital_task_ends_the_process_and_says_why() {
    let victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "victim", "--nocapture", "--test-threads=1"])
        .env(VICTIM, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&victim.stderr);
    assert_eq!(victim.status.signal(), Some(6), "{said}");
    assert!(
        said.contains("aborting: the core panicked: an index that is not there"),
        "{said}"
    );
}

#[tokio::test]
async fn a_vital_task_that_ends_well_gives_its_value() {
    assert_eq!(palyra_platform::vital("the core", async { 7 }).await, 7);
}
