//! A lease for a test: folders, a shell script as its tool, and what came of it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use palyra_node::worker::execute::{Control, Ended, How, execute};
use palyra_node::worker::place::Place;
use palyra_node::worker::spec::{Arg, Bounds, Spec, boot_ms};
use palyra_node::worker::supervise::Program;
use tokio::sync::watch;

/// Longer than any test.
pub(crate) const LONG: u64 = 60_000;

static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Lease {
    _dir: tempfile::TempDir,
    pub(crate) place: Place,
    pub(crate) spec: Spec,
    pub(crate) stop: watch::Sender<Option<String>>,
    pub(crate) kill_at: watch::Sender<u64>,
    pub(crate) control: Control,
    pub(crate) stderr: Vec<u8>,
}

pub(crate) fn bounds() -> Bounds {
    Bounds {
        memory_bytes: 256 << 20,
        processes: 256,
        disk_bytes: 32 << 20,
        cpu_percent: 200,
        open_files: 256,
        network: false,
    }
}

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

impl Lease {
    /// A lease whose tool is this script.
    pub(crate) fn new(script: &str) -> Self {
        Self::with(script, bounds())
    }

    pub(crate) fn with(script: &str, bounds: Bounds) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let id = format!(
            "TEST{}N{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let place = Place::make(&dir.path().join("leases"), &id, &bounds).unwrap();
        std::fs::write(place.tool().join("tool.sh"), script).unwrap();
        let uid = is_root().then_some(61_184);
        place.fill(b"{\"answer\": 42}", uid).unwrap();
        let mut spec = Spec {
            lease_id: id,
            kill_at_ms: boot_ms() + LONG,
            argv: vec![Arg::Plain("/bin/sh".to_owned()), Arg::Tool("tool.sh".to_owned())],
            env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
            params: PathBuf::new(),
            tool_dir: PathBuf::new(),
            work_dir: PathBuf::new(),
            root_dir: PathBuf::new(),
            workspace: None,
            allowed: vec!["in".into(), "out".into()],
            read_only: vec![],
            image: None,
            read: vec![],
            bounds,
            cgroup_procs: vec![],
            cgroups: vec![],
            uid,
            require: ["landlock", "pidns", "mountns", "netns"]
                .map(str::to_owned)
                .into(),
            without: vec![],
        };
        place.describe(&mut spec);
        let (stop, stopped) = watch::channel(None);
        let (kill_at, kill_at_ms) = watch::channel(spec.kill_at_ms);
        let control = Control {
            kill_at_ms,
            stop: stopped,
            timeout: Duration::from_mins(2),
            grace: Duration::from_millis(300),
            max_result: 256 * 1024,
        };
        Self {
            _dir: dir,
            place,
            spec,
            stop,
            kill_at,
            control,
            stderr: Vec::new(),
        }
    }

    /// Without these parts of the sandbox.
    pub(crate) fn without(mut self, parts: &[&str]) -> Self {
        self.spec.without = parts.iter().map(|part| (*part).to_owned()).collect();
        self.spec.require.clear();
        self
    }

    pub(crate) fn ending_in(mut self, ms: u64) -> Self {
        self.spec.kill_at_ms = boot_ms() + ms;
        self.kill_at.send_replace(self.spec.kill_at_ms);
        self
    }

    pub(crate) fn run(&mut self) -> Ended {
        runtime().block_on(self.go())
    }

    pub(crate) async fn go(&mut self) -> Ended {
        let (stderr, control, program) = (&mut self.stderr, &mut self.control, program());
        let ended = execute(&program, &self.spec, control, |piece| {
            stderr.extend_from_slice(piece)
        });
        ended.await.unwrap()
    }

    /// Runs it, and answers what it wrote; it must have ended by itself.
    pub(crate) fn said(&mut self) -> String {
        let ended = self.run();
        assert!(matches!(ended.how, How::Exited(_)), "{ended:?} {}", self.words());
        assert!(ended.gone, "{ended:?}");
        String::from_utf8_lossy(&ended.stdout).into_owned()
    }

    pub(crate) fn words(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Who is in its control groups, where there are any.
    pub(crate) fn members(&self) -> String {
        self.spec.cgroup_procs.iter().map(|path| read(path)).collect()
    }

    pub(crate) fn out(&self, name: &str) -> PathBuf {
        self.place.work().join("out").join(name)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A test that failed must leave nothing that runs.
        let cleaned = self.place.clean();
        if !std::thread::panicking() {
            cleaned.unwrap();
        }
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// This very program.
pub(crate) fn program() -> Program {
    Program::this()
}

/// Processes of this machine whose command line has this word.
pub(crate) fn processes(word: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if let Some(pid) = pid
            && String::from_utf8_lossy(&line).contains(word)
        {
            found.push(pid);
        }
    }
    found
}

/// Waits for what must come; only a failing test takes long.
pub(crate) fn until(what: &str, mut there: impl FnMut() -> bool) {
    let give_up = std::time::Instant::now() + Duration::from_mins(1);
    while !there() {
        assert!(std::time::Instant::now() < give_up, "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
