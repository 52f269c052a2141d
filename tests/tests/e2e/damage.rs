//! What happens to data folders: a byte changes, a disk is full, a database is lost, a later release has been there.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use palyra_tests::cluster::Cluster;
use palyra_tests::node::identity;

use crate::dispatch::{invoke, request, working_node};
use crate::faults::caught_up;

fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

/// Flips one bit of the first place where `text` stands in a file of the database. Answers whether it stood anywhere.
fn change_a_byte(db: &Path, text: &str) -> bool {
    let mut files: Vec<PathBuf> = std::fs::read_dir(db)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    for file in files.iter().filter(|file| file.is_file()) {
        let mut bytes = std::fs::read(file).unwrap();
        let found = bytes
            .windows(text.len())
            .position(|window| window == text.as_bytes());
        if let Some(at) = found {
            bytes[at] ^= 1;
            std::fs::write(file, bytes).unwrap();
            return true;
        }
    }
    false
}

pub(crate) async fn one_changed_byte_is_found(cluster: &mut Cluster) {
    let (device_id, _) = identity(&cluster.pair_node("remembered").await);
    let reason = "a reason that stands in the journal";
    let _ = cluster
        .palyra(&["device", "revoke", &device_id, "--reason", reason])
        .ok();
    // As somebody does who wants to look into it: the replica is stopped while its folder is copied.
    cluster.terminate(1);
    let copy = cluster.path().join("copy");
    copy_folder(Path::new(&cluster.folder(1)), &copy);
    cluster.start_replica(1);
    let verify =
        |cluster: &Cluster| cluster.palyra(&["journal", "verify", "--data-dir", &copy.display().to_string()]);
    let intact = verify(cluster).ok();
    assert!(intact.out.contains("intact"), "{}", intact.out);
    assert!(
        change_a_byte(&copy.join("db"), reason),
        "the reason stands nowhere"
    );
    let broken = verify(cluster);
    assert_eq!(broken.code, 14, "{}{}", broken.out, broken.err);
    let said = format!("{}{}", broken.out, broken.err);
    assert!(said.contains("BROKEN") || said.contains("damaged"), "{said}");
    caught_up(cluster).await;
}

pub(crate) async fn a_folder_from_the_future_is_refused(cluster: &mut Cluster) {
    cluster.terminate(2);
    let folder = PathBuf::from(cluster.folder(2));
    let format = folder.join("db/FORMAT");
    let text = std::fs::read_to_string(&format).unwrap();
    std::fs::write(&format, text.replace("format ", "format 9")).unwrap();
    let refused = cluster.palyrad(&[
        "run",
        "--config",
        &folder.join("palyrad.toml").display().to_string(),
    ]);
    assert_eq!(refused.code, 5, "{}", refused.err);
    assert!(refused.err.contains("format 9"), "{}", refused.err);
    std::fs::write(&format, text).unwrap();
    cluster.start_replica(2);
    caught_up(cluster).await;
}

pub(crate) async fn a_replica_without_its_database_stays_out(cluster: &mut Cluster) {
    cluster.terminate(3);
    let folder = PathBuf::from(cluster.folder(3));
    let aside = cluster.path().join("db-aside");
    std::fs::rename(folder.join("db"), &aside).unwrap();
    let refused = cluster.palyrad(&[
        "run",
        "--config",
        &folder.join("palyrad.toml").display().to_string(),
    ]);
    assert_eq!(refused.code, 7, "{}", refused.err);
    assert!(
        refused.err.contains("db") && refused.err.contains("join"),
        "{}",
        refused.err
    );
    let _ = std::fs::remove_dir_all(folder.join("db"));
    std::fs::rename(&aside, folder.join("db")).unwrap();
    cluster.start_replica(3);
    caught_up(cluster).await;
}

/// A small file system of its own; gone with the test.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where this user may not mount.
    fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=0700");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(at)
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then(|| SmallDisk(at.to_path_buf()))
    }

    /// Writes until nothing more goes in.
    fn fill(&self) {
        let mut ballast = std::fs::File::create(self.0.join("ballast")).unwrap();
        while ballast.write_all(&[7; 4096]).is_ok() {}
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

pub(crate) async fn a_full_disk_stops_one_replica(cluster: &mut Cluster) {
    let folder = PathBuf::from(cluster.folder(3));
    let aside = cluster.path().join("r3-aside");
    cluster.terminate(3);
    std::fs::rename(&folder, &aside).unwrap();
    let Some(disk) = SmallDisk::mount(&folder, "128m") else {
        println!("  left out: a small disk needs the right to mount");
        std::fs::remove_dir(&folder).unwrap();
        std::fs::rename(&aside, &folder).unwrap();
        cluster.start_replica(3);
        return caught_up(cluster).await;
    };
    copy_folder(&aside.join("."), &folder);
    cluster.start_replica(3);
    caught_up(cluster).await;
    let (_dir, device_id, _agent) = working_node(cluster, "cramped").await;
    disk.fill();
    let payload = format!("\"{}\"", "x".repeat(100 * 1024));
    let ended = loop {
        // The majority goes on: each of these is accepted and answered.
        let done = invoke(cluster, 1, request(&device_id, "echo", &payload)).await;
        assert_eq!(done.state, "succeeded", "{done:?}");
        if let Some(ended) = cluster.ended(3) {
            break ended;
        }
    };
    assert!(!ended.success());
    let said = cluster.log(3);
    assert!(said.contains("no space"), "{said}");
    disk.free();
    cluster.start_replica(3);
    caught_up(cluster).await;
    let verified = cluster.palyra(&["--endpoint", &cluster.node_addr(3), "journal", "verify"]);
    assert_eq!(verified.code, 0, "{}{}", verified.out, verified.err);
    let done = invoke(cluster, 3, request(&device_id, "echo", "1")).await;
    assert_eq!(done.state, "succeeded");
    cluster.terminate(3);
    drop(disk);
    std::fs::remove_dir(&folder).unwrap();
}
