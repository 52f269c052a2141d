//! What starts the agent with the machine: a systemd unit where systemd runs, else a script in the folder.
//!
//! Invariants: what was written is recorded before it is written, so that `uninstall` removes exactly this; a
//! file that `install` didn't make is never replaced or removed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::home::write_atomic;
use crate::service::StartConfig;
use crate::{Error, Home, Kind, Result};

const RECORD: &str = "run/installed.json";
const USER_TARGET: &str = "default.target";
const SYSTEM_TARGET: &str = "multi-user.target";
const FIRST_LINE: &str = "# Made by `palyra node install`; remove it with `palyra node uninstall`.\n";

/// Who the unit is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// systemd's user instance.
    User,
    /// The machine; needs root.
    System,
}

/// What [`install`] did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    /// The file that was written.
    pub path: PathBuf,
    /// True for a systemd unit, false for a plain script because systemd isn't there.
    pub systemd: bool,
    /// What to type next.
    pub next: String,
}

/// Has the agent started with the machine: a systemd unit where systemd runs, else a script in the folder for
/// an init or a cron `@reboot` line to run. Doing it again rewrites the same file.
///
/// Errors: no such folder, no permission, a file of somebody else in the way.
pub fn install(config: &StartConfig, scope: Scope) -> Result<Installed> {
    let home = Home::open(&config.data_dir)?;
    let systemd = Path::new("/run/systemd/system").is_dir();
    install_at(&home, config, scope, systemd.then(|| unit_dir(scope)))
}

fn unit_dir(scope: Scope) -> PathBuf {
    let base = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".config");
    match scope {
        Scope::System => PathBuf::from("/etc/systemd/system"),
        Scope::User => std::env::var_os("XDG_CONFIG_HOME")
            .map_or_else(base, PathBuf::from)
            .join("systemd/user"),
    }
}

fn install_at(home: &Home, config: &StartConfig, scope: Scope, dir: Option<PathBuf>) -> Result<Installed> {
    let made = match &dir {
        Some(dir) => {
            let user = if scope == Scope::User { "--user " } else { "" };
            let next = format!("systemctl {user}daemon-reload && systemctl {user}enable --now palyra-node");
            Installed {
                path: dir.join("palyra-node.service"),
                systemd: true,
                next,
            }
        }
        None => Installed {
            path: home.dir().join("run/start-with-machine"),
            systemd: false,
            next: "no systemd here: have your init, or cron's @reboot, run that file with sh when the machine starts"
                .to_owned(),
        },
    };
    check_place(home, &made.path)?;
    if let Some(dir) = &dir {
        std::fs::create_dir_all(dir).map_err(|error| Error::io("make", dir, &error))?;
    }
    let text = if made.systemd {
        unit(home, config, scope)
    } else {
        start_script(home, config)
    };
    home.write_json(RECORD, &made, 0o644)?;
    write_atomic(&made.path, text.as_bytes(), 0o644)?;
    Ok(made)
}

/// Whether a file may be written there without taking something from somebody.
fn check_place(home: &Home, path: &Path) -> Result<()> {
    let conflict = |message, next| Err(Error::new(Kind::Conflict, "N0112", message, next));
    let before = installed(home)?;
    let other = before
        .as_ref()
        .filter(|before| before.path != path && before.path.exists());
    if let Some(other) = other {
        // Its record would be lost, and nothing would remove it any more.
        let message = format!("it is installed already, at {}", other.path.display());
        return conflict(message, "palyra node uninstall, then again");
    }
    let is_made_here = || std::fs::read_to_string(path).is_ok_and(|text| text.starts_with(FIRST_LINE));
    if path.exists() && !(before.is_some() && is_made_here()) {
        let message = format!("{} exists and was not made for this folder", path.display());
        return conflict(message, "remove it yourself if nobody needs it, then again");
    }
    Ok(())
}

/// What [`install`] wrote and is still recorded.
pub(crate) fn installed(home: &Home) -> Result<Option<Installed>> {
    home.read_json(RECORD)
}

/// What [`uninstall`] removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The file that is gone.
    pub path: PathBuf,
    /// What to type next; empty when nothing is left to do.
    pub next: String,
}

/// Removes what [`install`] wrote, and nothing else; a running agent goes on. `None` when nothing was
/// installed.
///
/// Errors: no such folder, no permission, a file that somebody replaced.
pub fn uninstall(data_dir: &Path) -> Result<Option<Removed>> {
    let home = Home::open(data_dir)?;
    let Some(made) = installed(&home)? else {
        return Ok(None);
    };
    match std::fs::read_to_string(&made.path) {
        Ok(text) if text.starts_with(FIRST_LINE) => {
            std::fs::remove_file(&made.path).map_err(|error| Error::io("remove", &made.path, &error))?;
        }
        Ok(_) => {
            let message = format!("{} was replaced by somebody", made.path.display());
            return Err(Error::new(
                Kind::Conflict,
                "N0112",
                message,
                "remove it yourself if nobody needs it",
            ));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read", &made.path, &error)),
    }
    let mut next = String::new();
    if made.systemd {
        let user = if made.next.contains("--user") {
            "--user "
        } else {
            ""
        };
        next = format!("systemctl {user}stop palyra-node; systemctl {user}daemon-reload");
        disable(&made.path)?;
    }
    home.remove(RECORD)?;
    Ok(Some(Removed {
        path: made.path,
        next,
    }))
}

/// Removes what `systemctl enable` made of the unit: links to it that would lead nowhere now.
fn disable(unit: &Path) -> Result<()> {
    for target in [USER_TARGET, SYSTEM_TARGET] {
        let link = unit
            .with_file_name(format!("{target}.wants"))
            .join("palyra-node.service");
        if std::fs::read_link(&link).is_ok_and(|to| to == unit) {
            std::fs::remove_file(&link).map_err(|error| Error::io("remove", &link, &error))?;
        }
    }
    Ok(())
}

fn unit(home: &Home, config: &StartConfig, scope: Scope) -> String {
    let target = if scope == Scope::User {
        USER_TARGET
    } else {
        SYSTEM_TARGET
    };
    // Revoked (3) and superseded (11) are final: starting again would only be refused again.
    format!(
        "{FIRST_LINE}[Unit]\nDescription=Palyra node\nAfter=network-online.target\n\
         Wants=network-online.target\n\n\
         [Service]\nType=exec\nExecStart={}\nRestart=on-failure\nRestartSec=2\n\
         RestartPreventExitStatus=2 3 7 11\n\
         KillMode=mixed\nTimeoutStopSec=30\nNoNewPrivileges=yes\n\n[Install]\nWantedBy={target}\n",
        command_line(home, config, "run", systemd_quote)
    )
}

fn start_script(home: &Home, config: &StartConfig) -> String {
    // In the background, with its log files: nothing here would keep its output.
    format!(
        "{FIRST_LINE}exec {}\n",
        command_line(home, config, "start", shell_quote)
    )
}

fn command_line(home: &Home, config: &StartConfig, verb: &str, quote: fn(&OsStr) -> String) -> String {
    let dir = home.dir().as_os_str();
    let program = config.program.as_os_str();
    let fixed = [
        program,
        "node".as_ref(),
        verb.as_ref(),
        "--data-dir".as_ref(),
        dir,
    ];
    let extra = config.extra_args.iter().map(|argument| argument.as_os_str());
    fixed
        .into_iter()
        .chain(extra)
        .map(quote)
        .collect::<Vec<_>>()
        .join(" ")
}

fn systemd_quote(word: &OsStr) -> String {
    let mut quoted = String::from("\"");
    for symbol in word.to_string_lossy().chars() {
        match symbol {
            '"' | '\\' => quoted.extend(['\\', symbol]),
            // Specifiers and variables.
            '%' | '$' => quoted.extend([symbol, symbol]),
            '\n' => quoted.push_str("\\n"),
            other => quoted.push(other),
        }
    }
    quoted + "\""
}

fn shell_quote(word: &OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn config(home: &Home) -> StartConfig {
        StartConfig {
            data_dir: home.dir().to_path_buf(),
            program: PathBuf::from("/opt/pal yra/palyra"),
            extra_args: vec!["--label".into(), "cost=5%\"$x".into()],
            wait: Duration::ZERO,
        }
    }

    #[test]
    fn a_unit_is_written_rewritten_and_removed() {
        let (dir, units) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let home = Home::create(dir.path()).unwrap();
        let units = units.path().join("systemd/user");
        let made = install_at(&home, &config(&home), Scope::User, Some(units.clone())).unwrap();
        assert!(made.systemd && made.next.contains("--user"));
        let text = std::fs::read_to_string(&made.path).unwrap();
        let data_dir = home.dir().display();
        let line = format!(
            "ExecStart=\"/opt/pal yra/palyra\" \"node\" \"run\" \"--data-dir\" \"{data_dir}\" \
             \"--label\" \"cost=5%%\\\"$$x\"\n"
        );
        assert!(text.contains(&line), "{text}");
        install_at(&home, &config(&home), Scope::User, Some(units.clone())).unwrap();
        let enabled = units.join("default.target.wants/palyra-node.service");
        std::fs::create_dir(enabled.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&made.path, &enabled).unwrap();
        let removed = uninstall(home.dir()).unwrap().unwrap();
        assert!(removed.path == made.path && removed.next.contains("--user daemon-reload"));
        assert!(!made.path.exists() && std::fs::symlink_metadata(&enabled).is_err());
        assert_eq!(uninstall(home.dir()).unwrap(), None);
    }

    #[test]
    fn without_systemd_a_marker_says_what_to_run() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(dir.path()).unwrap();
        let made = install_at(&home, &config(&home), Scope::System, None).unwrap();
        assert!(!made.systemd && made.next.contains("no systemd"));
        let text = std::fs::read_to_string(&made.path).unwrap();
        assert!(
            text.contains("exec '/opt/pal yra/palyra' 'node' 'start'"),
            "{text}"
        );
        assert!(text.ends_with("'--label' 'cost=5%\"$x'\n"), "{text}");
        let read = std::process::Command::new("sh")
            .arg("-n")
            .arg(&made.path)
            .status();
        assert!(read.unwrap().success(), "a shell can read it");
    }

    #[test]
    fn files_of_others_are_left_alone() {
        let (dir, units) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let home = Home::create(dir.path()).unwrap();
        let path = units.path().join("palyra-node.service");
        std::fs::write(&path, "theirs").unwrap();
        let install = || {
            install_at(
                &home,
                &config(&home),
                Scope::System,
                Some(units.path().to_path_buf()),
            )
        };
        assert_eq!(install().unwrap_err().code, "N0112");
        std::fs::remove_file(&path).unwrap();
        install().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let second = install_at(
            &home,
            &config(&home),
            Scope::User,
            Some(elsewhere.path().to_path_buf()),
        );
        assert_eq!(second.unwrap_err().code, "N0112", "the first would be forgotten");
        std::fs::write(&path, "theirs").unwrap();
        assert_eq!(install().unwrap_err().code, "N0112", "not even where ours was");
        assert_eq!(uninstall(home.dir()).unwrap_err().code, "N0112");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
    }
}
