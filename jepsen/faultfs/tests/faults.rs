//! Every fault, as a process meets it through the kernel.
#![allow(clippy::unwrap_used)]

mod mounted;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use mounted::Mounted;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use palyra_jepsen_faultfs::{Fault, Keep, Lost, Operation, PowerLoss};

/// Longer than any test takes; what it bounds ends by an event.
const LONG: Duration = Duration::from_secs(60);

fn power(mounted: &Mounted, keep: Keep, strict_dir: bool) -> Lost {
    mounted.handle.power_loss(&PowerLoss {
        keep,
        strict_dir,
        seed: 7,
    })
}

fn create(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.open(path).unwrap()
}

fn file_of(mounted: &Mounted, name: &str) -> PathBuf {
    mounted.path().join(name)
}

fn sync_folder(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

fn code<T>(result: io::Result<T>) -> Option<Errno> {
    result.err()?.raw_os_error().map(Errno::from_raw)
}

#[test]
fn power_takes_what_was_not_synced_and_every_handle() {
    let Some(mounted) = Mounted::new() else { return };
    let mut file = create(&file_of(&mounted, "f"));
    file.write_all(b"synced").unwrap();
    file.sync_data().unwrap();
    file.write_all(b" and not").unwrap();
    create(&file_of(&mounted, "g")).write_all(b"g").unwrap();
    assert_eq!(fs::read(file_of(&mounted, "f")).unwrap(), b"synced and not");

    let lost = power(&mounted, Keep::Nothing, false);
    assert_eq!((lost.edits, lost.bytes, lost.names), (2, 9, 1));
    assert_eq!(fs::read(file_of(&mounted, "f")).unwrap(), b"synced");
    assert!(!file_of(&mounted, "g").exists());
    assert_eq!(code(file.write_all(b"x")), Some(Errno::EIO));
    assert_eq!(code(file.sync_all()), Some(Errno::EIO));
    assert!(mounted.handle.counters().stale >= 2);
    // The same place works on as a new machine would find it.
    fs::write(file_of(&mounted, "g"), b"again").unwrap();
    assert_eq!(fs::read(file_of(&mounted, "g")).unwrap(), b"again");
}

#[test]
fn names_need_a_sync_of_their_folder_only_for_a_strict_loss() {
    let Some(mounted) = Mounted::new() else { return };
    for strict in [false, true] {
        let [name, other] = [format!("f{strict}"), format!("g{strict}")].map(|name| file_of(&mounted, &name));
        create(&name).sync_all().unwrap();
        fs::rename(&name, &other).unwrap();
        create(&name).sync_all().unwrap();
        power(&mounted, Keep::Nothing, strict);
        assert_eq!((name.exists(), other.exists()), (!strict, !strict));
        fs::write(&name, b"").unwrap();
        sync_folder(mounted.path());
        power(&mounted, Keep::Nothing, true);
        assert!(name.exists());
    }
}

#[test]
fn a_failed_sync_loses_bytes_that_a_second_one_does_not_bring_back() {
    let Some(mounted) = Mounted::new() else { return };
    let mut file = create(&file_of(&mounted, "w.log"));
    let other = create(&file_of(&mounted, "other"));
    sync_folder(mounted.path());
    let fault = mounted.handle.inject(Fault::fsync_eio_once().only(".log"));
    file.write_all(b"lost").unwrap();
    other.sync_all().unwrap();
    assert_eq!(code(file.sync_data()), Some(Errno::EIO));
    file.sync_data().unwrap();
    assert_eq!(mounted.handle.hits(fault), 1);
    assert_eq!(fs::read(file_of(&mounted, "w.log")).unwrap(), b"lost");
    power(&mounted, Keep::Scatter, false);
    assert_eq!(fs::read(file_of(&mounted, "w.log")).unwrap(), b"");
}

#[test]
fn a_lie_says_yes_and_an_honest_sync_makes_up_for_it() {
    let Some(mounted) = Mounted::new() else { return };
    for honest in [false, true] {
        let mut file = create(&file_of(&mounted, "f"));
        sync_folder(mounted.path());
        let fault = mounted.handle.inject(Fault::lost_fsync());
        file.write_all(b"believed").unwrap();
        file.sync_all().unwrap();
        assert!(mounted.handle.clear(fault));
        if honest {
            file.sync_all().unwrap();
        }
        power(&mounted, Keep::Nothing, false);
        assert_eq!(fs::read(file_of(&mounted, "f")).unwrap().is_empty(), !honest);
        assert_eq!(mounted.handle.hits(fault), 1);
    }
}

#[test]
fn errors_meet_the_operations_they_were_meant_for() {
    let Some(mounted) = Mounted::new() else { return };
    let path = file_of(&mounted, "f");
    let file = create(&path);
    let cases: [(Operation, &dyn Fn() -> Option<Errno>); 5] = [
        (Operation::Write, &|| code(file.write_at(b"x", 0))),
        (Operation::Write, &|| code(file.set_len(100))),
        (Operation::Read, &|| code(file.read_at(&mut [0], 0))),
        (Operation::Sync, &|| code(file.sync_all())),
        (Operation::Name, &|| {
            code(fs::rename(&path, path.with_extension("x")))
        }),
    ];
    for (operation, act) in cases {
        let fault = mounted.handle.inject(Fault::eio(&[operation]));
        assert_eq!(act(), Some(Errno::EIO), "{operation:?}");
        assert!(mounted.handle.clear(fault));
        assert_eq!(act(), None, "{operation:?}");
        assert_eq!(mounted.handle.hits(fault), 1);
    }
}

#[test]
fn a_stall_holds_writes_and_lets_reads_through() {
    let Some(mounted) = Mounted::new() else { return };
    let file = create(&file_of(&mounted, "f"));
    file.write_all_at(b"before", 0).unwrap();
    let fault = mounted.handle.inject(Fault::stall(&[Operation::Write], LONG));
    thread::scope(|scope| {
        let writer = scope.spawn(|| file.write_all_at(b"after!", 0));
        assert!(mounted.handle.await_waiting(1, LONG));
        assert_eq!(fs::read(file_of(&mounted, "f")).unwrap(), b"before");
        assert!(!writer.is_finished());
        assert!(mounted.handle.clear(fault));
        writer.join().unwrap().unwrap();
    });
    assert_eq!(fs::read(file_of(&mounted, "f")).unwrap(), b"after!");
    assert_eq!((mounted.handle.waiting(), mounted.handle.hits(fault)), (0, 1));
}

#[test]
fn a_watchdog_ends_a_stall_that_nobody_ends() {
    let Some(mounted) = Mounted::new() else { return };
    let file = create(&file_of(&mounted, "f"));
    let fault = mounted
        .handle
        .inject(Fault::stall(&[Operation::Sync], Duration::ZERO));
    file.sync_all().unwrap();
    assert!(!mounted.handle.clear(fault), "the watchdog has cleared it");
}

#[test]
fn a_slow_sync_holds_its_file_and_no_other() {
    let Some(mounted) = Mounted::new() else { return };
    let [file, other] = ["f", "g"].map(|name| create(&file_of(&mounted, name)));
    file.write_all_at(b"early", 0).unwrap();
    let fault = mounted.handle.inject(Fault::slow_fsync(LONG).only("f"));
    thread::scope(|scope| {
        let syncer = scope.spawn(|| file.sync_all());
        assert!(mounted.handle.await_waiting(1, LONG));
        other.write_all_at(b"meanwhile", 0).unwrap();
        other.sync_all().unwrap();
        assert!(!syncer.is_finished());
        assert!(mounted.handle.clear(fault));
        syncer.join().unwrap().unwrap();
    });
    power(&mounted, Keep::Nothing, false);
    assert_eq!(fs::read(file_of(&mounted, "f")).unwrap(), b"early");
}

#[test]
fn a_loss_of_power_ends_what_is_stalled() {
    let Some(mounted) = Mounted::new() else { return };
    let file = create(&file_of(&mounted, "f"));
    mounted.handle.inject(Fault::stall(&[Operation::Write], LONG));
    thread::scope(|scope| {
        let writer = scope.spawn(|| file.write_all_at(b"x", 0));
        assert!(mounted.handle.await_waiting(1, LONG));
        power(&mounted, Keep::Nothing, false);
        assert_eq!(code(writer.join().unwrap()), Some(Errno::EIO));
    });
}

#[test]
fn a_full_disk_refuses_writes_and_goes_on_reading() {
    let Some(mounted) = Mounted::new() else { return };
    let file = create(&file_of(&mounted, "f"));
    file.write_all_at(&[1; 10_000], 0).unwrap();
    mounted.handle.fill(5000);
    file.write_all_at(&[1; 2000], 12_288).unwrap();
    assert_eq!(code(file.write_all_at(&[1; 10_000], 20_000)), Some(Errno::ENOSPC));
    file.write_all_at(&[2; 10], 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(file.read_at(&mut [0; 10], 0).unwrap(), 10);
    let about = nix::sys::statvfs::statvfs(mounted.path()).unwrap();
    assert!(about.blocks_free() * about.fragment_size() < 8192);
    assert_eq!(mounted.handle.counters().full, 1);
    mounted.handle.clear_all();
    file.write_all_at(&[1; 10_000], 20_000).unwrap();
}

#[test]
fn one_bit_of_what_is_read_is_another_one() {
    let Some(mounted) = Mounted::new() else { return };
    fs::write(file_of(&mounted, "f.sst"), [0; 5000]).unwrap();
    let fault = mounted.handle.inject(Fault::bit_flips().only(".sst").times(1));
    let mut bytes = [0; 5000];
    File::open(file_of(&mounted, "f.sst"))
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    assert_eq!(bytes.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
    assert_eq!(mounted.handle.hits(fault), 1);
    assert_eq!(fs::read(file_of(&mounted, "f.sst")).unwrap(), [0; 5000]);
}

#[test]
fn locks_hold_between_handles() {
    let Some(mounted) = Mounted::new() else { return };
    let [one, two] = [(), ()].map(|()| create(&file_of(&mounted, "LOCK")));
    let held = Flock::lock(one, FlockArg::LockExclusiveNonblock).unwrap();
    let (two, errno) = Flock::lock(two, FlockArg::LockExclusiveNonblock).unwrap_err();
    assert_eq!(errno, Errno::EWOULDBLOCK);
    drop(held);
    Flock::lock(two, FlockArg::LockExclusiveNonblock).unwrap();
}

#[test]
fn direct_and_synchronous_writes_work_and_programs_run_from_it() {
    let Some(mounted) = Mounted::new() else { return };
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
        .open(file_of(&mounted, "f"))
        .unwrap();
    file.write_all_at(b"there at once", 0).unwrap();
    fs::copy("/bin/true", file_of(&mounted, "true")).unwrap();
    fs::set_permissions(file_of(&mounted, "true"), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(
        Command::new(file_of(&mounted, "true"))
            .status()
            .unwrap()
            .success()
    );
    power(&mounted, Keep::Nothing, false);
    assert_eq!(fs::read(file_of(&mounted, "f")).unwrap(), b"there at once");
}

#[test]
fn a_listing_misses_nothing_while_it_is_being_emptied() {
    let Some(mounted) = Mounted::new() else { return };
    for number in 0..3000 {
        fs::write(file_of(&mounted, &format!("a-rather-long-name-{number}")), b"").unwrap();
    }
    for entry in fs::read_dir(mounted.path()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert_eq!(fs::read_dir(mounted.path()).unwrap().count(), 0);
}

#[test]
fn the_end_aborts_what_waits_and_leaves_nothing_mounted() {
    let Some(mounted) = Mounted::new() else { return };
    let path = mounted.path().to_owned();
    let file = create(&file_of(&mounted, "f"));
    let handle = mounted.handle.clone();
    handle.inject(Fault::stall(&[Operation::Sync], LONG));
    let syncer = thread::spawn(move || file.sync_all());
    assert!(handle.await_waiting(1, LONG));
    drop(mounted);
    assert!(syncer.join().unwrap().is_err());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(path.to_str().unwrap()));
    // Commands of somebody who has not heard of it do no harm.
    handle.clear_all();
    assert!(handle.await_idle(LONG));
}
