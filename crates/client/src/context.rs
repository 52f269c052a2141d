//! Contexts: under which name an operator reaches which cluster, with which credential.
//!
//! What never lives here: the environment (callers pass what they read from it, see [`home`]) and command
//! line flags.
//! Invariants: the file and the credentials are readable by their owner only; a change is read, made and
//! written under a lock, and put in place by a rename, so that a crash or a second command never loses a
//! context.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use palyra_pki::Credential;
use serde::{Deserialize, Serialize};

use crate::error::{Class, Error};

/// Name of the file with all contexts.
pub const FILE: &str = "contexts.toml";
const LOCK: &str = "contexts.lock";
const CREDENTIALS: &str = "credentials";
const NAME_MAX: usize = 64;
const FILE_MAX: u64 = 1024 * 1024;

/// One cluster as an operator reaches it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// The cluster's id.
    pub cluster_id: String,
    /// `host:port` of the replicas' listeners for operators.
    pub endpoints: Vec<String>,
    /// The credential's file; relative to the folder of contexts unless absolute.
    pub credential: PathBuf,
    /// When the endpoints were last compared with the cluster's own list, in milliseconds since the Unix
    /// epoch.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub learned_at_ms: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// All contexts of an operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    /// The one that is used when none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// By name.
    #[serde(default)]
    pub contexts: BTreeMap<String, Context>,
}

/// The folder of contexts: `palyra_home`, or `palyra` under the configuration folder, or `~/.config/palyra`.
///
/// # Errors
/// [`Class::Invalid`] when none of the three is known.
pub fn home(
    palyra_home: Option<PathBuf>,
    xdg_config: Option<PathBuf>,
    user_home: Option<PathBuf>,
) -> Result<PathBuf, Error> {
    let set = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
    set(palyra_home)
        .or_else(|| set(xdg_config).map(|path| path.join("palyra")))
        .or_else(|| set(user_home).map(|path| path.join(".config/palyra")))
        .ok_or_else(|| {
            let message = "neither PALYRA_HOME nor HOME is set, so there is no folder for contexts";
            Error::local(Class::Invalid, message, "set PALYRA_HOME to a folder of your own")
        })
}

impl Contexts {
    /// Reads the contexts in `home`; none when there is no file.
    ///
    /// # Errors
    /// When the file can't be read or holds something else.
    pub fn load(home: &Path) -> Result<Contexts, Error> {
        let path = home.join(FILE);
        let text = match read_small(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Contexts::default()),
            Err(error) => return Err(file_error("read", &path, &error)),
        };
        toml::from_str(&text).map_err(|error| {
            let message = format!("{} is not a contexts file: {}", path.display(), error.message());
            Error::local(
                Class::Invalid,
                message,
                "repair or move it, then: palyra context add",
            )
        })
    }

    /// Changes the contexts in `home` under a lock; nothing is written when `change` fails.
    ///
    /// # Errors
    /// Those of `change`, and when the file can't be read or written.
    pub fn update<T>(
        home: &Path,
        change: impl FnOnce(&mut Contexts) -> Result<T, Error>,
    ) -> Result<T, Error> {
        create_private_dir(home).map_err(|error| file_error("create", home, &error))?;
        let path = home.join(LOCK);
        let lock = private(OpenOptions::new().create(true).truncate(false)).open(&path);
        let lock = lock.map_err(|error| file_error("open", &path, &error))?;
        lock.lock().map_err(|error| file_error("lock", &path, &error))?;
        let mut contexts = Contexts::load(home)?;
        let answer = change(&mut contexts)?;
        let text = toml::to_string(&contexts).map_err(|error| {
            Error::local(Class::Internal, format!("contexts can't be written: {error}"), "")
        })?;
        write_private(&home.join(FILE), text.as_bytes())?;
        Ok(answer)
    }

    /// The context called `name`, or the current one, or the only one.
    ///
    /// # Errors
    /// [`Class::NotFound`] when there is no such context, [`Class::Invalid`] when several could be meant.
    pub fn select(&self, name: Option<&str>) -> Result<(&str, &Context), Error> {
        let wanted = name.or(self.current.as_deref());
        let found = match wanted {
            Some(name) => self.contexts.get_key_value(name),
            None if self.contexts.len() == 1 => self.contexts.iter().next(),
            None => None,
        };
        if let Some((name, context)) = found {
            return Ok((name.as_str(), context));
        }
        let names: Vec<&str> = self.contexts.keys().map(String::as_str).collect();
        Err(match (wanted, names.is_empty()) {
            (Some(name), _) => Error::local(
                Class::NotFound,
                format!("there is no context {name:?}"),
                "palyra context ls",
            ),
            (None, true) => Error::local(
                Class::Invalid,
                "no cluster is known here: there is no context",
                "make a cluster: palyra cluster init --data-dir DIR --name r1\n        \
                 or take a credential: palyra context add NAME --credential FILE",
            ),
            (None, false) => Error::local(
                Class::Invalid,
                format!("several contexts and none is current: {}", names.join(", ")),
                "palyra context use NAME, or name one: --context NAME",
            ),
        })
    }

    /// Adds a context with its credential, which is written next to the contexts, and makes it current when
    /// it is the first or `make_current`.
    ///
    /// # Errors
    /// [`Class::Conflict`] when the name is taken and not `replace`; when files can't be written.
    pub fn add(home: &Path, name: &str, credential: &Credential, options: Adding) -> Result<Context, Error> {
        check_name(name)?;
        let json = credential.to_json().map_err(|error| {
            Error::local(
                Class::Invalid,
                format!("the credential can't be written: {error}"),
                "",
            )
        })?;
        Contexts::update(home, |contexts| {
            if contexts.contexts.contains_key(name) && !options.replace {
                let next = format!("choose another name, or remove it first: palyra context rm {name}");
                return Err(Error::local(
                    Class::Conflict,
                    format!("there is a context {name:?} already"),
                    next,
                ));
            }
            let relative = Path::new(CREDENTIALS).join(format!("{name}.json"));
            let folder = home.join(CREDENTIALS);
            create_private_dir(&folder).map_err(|error| file_error("create", &folder, &error))?;
            write_private(&home.join(&relative), json.as_bytes())?;
            let endpoints = options.endpoints.unwrap_or_else(|| credential.endpoints.clone());
            let cluster_id = credential.cluster_id.clone();
            let context = Context {
                cluster_id,
                endpoints,
                credential: relative,
                learned_at_ms: 0,
            };
            contexts.contexts.insert(name.to_owned(), context.clone());
            if options.make_current || contexts.current.is_none() {
                contexts.current = Some(name.to_owned());
            }
            Ok(context)
        })
    }

    /// Removes a context, and its credential when that lies next to the contexts.
    ///
    /// # Errors
    /// [`Class::NotFound`] when there is none of that name.
    pub fn remove(home: &Path, name: &str) -> Result<Context, Error> {
        let removed = Contexts::update(home, |contexts| {
            let missing = || {
                Error::local(
                    Class::NotFound,
                    format!("there is no context {name:?}"),
                    "palyra context ls",
                )
            };
            let removed = contexts.contexts.remove(name).ok_or_else(missing)?;
            if contexts.current.as_deref() == Some(name) {
                contexts.current = None;
            }
            Ok(removed)
        })?;
        if removed.credential.is_relative() {
            let path = home.join(&removed.credential);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(file_error("remove", &path, &error));
                }
                _ => {}
            }
        }
        Ok(removed)
    }
}

/// How [`Contexts::add`] adds.
#[derive(Debug, Clone, Default)]
pub struct Adding {
    /// Where to reach the cluster; without it, the credential's own endpoints.
    pub endpoints: Option<Vec<String>>,
    /// Puts it in the place of a context of the same name.
    pub replace: bool,
    /// Makes it the current one.
    pub make_current: bool,
}

impl Context {
    /// The credential's file.
    #[must_use]
    pub fn credential_path(&self, home: &Path) -> PathBuf {
        home.join(&self.credential)
    }

    /// Reads the credential.
    ///
    /// # Errors
    /// When it can't be read, when others than its owner may read it, or when it is no credential.
    pub fn credential(&self, home: &Path) -> Result<Credential, Error> {
        read_credential(&self.credential_path(home))
    }
}

/// Reads a credential's file.
///
/// # Errors
/// [`Class::Denied`] when it can't be read, when others than its owner may read it, or when it is no
/// credential.
pub fn read_credential(path: &Path) -> Result<Credential, Error> {
    let refuse = |cause: String, next: String| {
        Error::local(
            Class::Denied,
            format!("the credential {}: {cause}", path.display()),
            next,
        )
    };
    let again = "palyra context add NAME --credential FILE";
    let metadata = fs::metadata(path).map_err(|error| refuse(error.to_string(), again.to_owned()))?;
    if metadata.permissions().mode() & 0o077 != 0 {
        let next = format!("chmod 600 {}", path.display());
        return Err(refuse("others than its owner may read it".to_owned(), next));
    }
    let text = read_small(path).map_err(|error| refuse(error.to_string(), again.to_owned()))?;
    Credential::from_json(&text).map_err(|error| refuse(error.to_string(), again.to_owned()))
}

/// Whether a context may be called `name`: 1 to 64 letters, digits, `.`, `-`, `_`, not beginning with a dot.
///
/// # Errors
/// [`Class::Invalid`] when not.
pub fn check_name(name: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > NAME_MAX || name.starts_with('.') || !name.bytes().all(plain) {
        let next = "1 to 64 letters, digits, '.', '-', '_', and no dot first";
        return Err(Error::local(
            Class::Invalid,
            format!("{name:?} is no name for a context"),
            next,
        ));
    }
    Ok(())
}

fn read_small(path: &Path) -> std::io::Result<String> {
    if fs::metadata(path)?.len() > FILE_MAX {
        return Err(std::io::Error::other("the file is too large"));
    }
    fs::read_to_string(path)
}

fn create_private_dir(path: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    options.write(true).mode(0o600)
}

/// Writes a file that only its owner can read, durably and all at once.
///
/// # Errors
/// When the folder can't be written.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let fail = |error: std::io::Error| file_error("write", path, &error);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = path.with_file_name(name);
    let mut file = private(OpenOptions::new().create(true).truncate(true))
        .open(&temporary)
        .map_err(fail)?;
    file.write_all(bytes).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    fs::rename(&temporary, path).map_err(fail)?;
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(fail)
}

fn file_error(verb: &str, path: &Path, error: &std::io::Error) -> Error {
    let message = format!("can't {verb} {}: {error}", path.display());
    Error::local(
        Class::Internal,
        message,
        "check the folder's owner and the room on its disk",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(endpoint: &str) -> Context {
        Context {
            cluster_id: "01ARZ3NDEKTSV4RRFFQ69G5FAV".to_owned(),
            endpoints: vec![endpoint.to_owned()],
            credential: PathBuf::from("credentials/x.json"),
            learned_at_ms: 0,
        }
    }

    #[test]
    fn changes_are_kept_and_private() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("deep/er");
        Contexts::update(&folder, |contexts| {
            contexts.contexts.insert("a".to_owned(), entry("h:1"));
            contexts.current = Some("a".to_owned());
            Ok(())
        })
        .unwrap();
        let read = Contexts::load(&folder).unwrap();
        assert_eq!(read.select(None).unwrap(), ("a", &entry("h:1")));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder.join(FILE)), mode(&folder)), (0o600, 0o700));
        let failed: Result<(), Error> = Contexts::update(&folder, |contexts| {
            contexts.contexts.clear();
            Err(Error::local(Class::Invalid, "no", ""))
        });
        assert!(failed.is_err());
        assert_eq!(
            Contexts::load(&folder).unwrap(),
            read,
            "a failed change leaves the file alone"
        );
    }

    #[test]
    fn selection_names_what_is_missing() {
        let mut contexts = Contexts::default();
        assert!(
            contexts
                .select(None)
                .unwrap_err()
                .message
                .contains("no cluster is known")
        );
        contexts.contexts.insert("a".to_owned(), entry("h:1"));
        assert_eq!(
            contexts.select(None).unwrap().0,
            "a",
            "the only one needs no name"
        );
        contexts.contexts.insert("b".to_owned(), entry("h:2"));
        assert!(contexts.select(None).unwrap_err().message.contains("a, b"));
        assert_eq!(contexts.select(Some("b")).unwrap().0, "b");
        let error = contexts.select(Some("c")).unwrap_err();
        assert_eq!((error.class, error.exit_code()), (Class::NotFound, 8));
    }

    #[test]
    fn a_damaged_file_is_named_and_not_overwritten() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(FILE);
        for text in ["current = 3", "[contexts.a]\nwhat = 1", "\u{1}"] {
            fs::write(&path, text).unwrap();
            let error = Contexts::update(home.path(), |_| Ok(())).unwrap_err();
            assert!(error.message.contains("contexts.toml"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_credential_that_others_can_read_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("c.json");
        fs::write(&path, "{}").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = read_credential(&path).unwrap_err();
        assert!(error.next.contains("chmod 600"), "{error:?}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let error = read_credential(&path).unwrap_err();
        assert_eq!(error.exit_code(), 3);
    }

    #[test]
    fn the_folder_follows_the_environment() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(home(path("/p"), path("/x"), path("/h")).unwrap(), Path::new("/p"));
        assert_eq!(
            home(path(""), path("/x"), path("/h")).unwrap(),
            Path::new("/x/palyra")
        );
        assert_eq!(
            home(None, None, path("/h")).unwrap(),
            Path::new("/h/.config/palyra")
        );
        assert!(home(None, None, None).is_err());
    }

    #[test]
    fn names_stay_file_names() {
        for bad in ["", ".x", "a/b", "..", "a b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        check_name("prod-1.eu_west").unwrap();
    }
}
