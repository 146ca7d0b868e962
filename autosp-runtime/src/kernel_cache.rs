//! Compiled kernels on disk, so that a program compiles each of them once for a machine and not once for a start.
//!
//! A file holds one compiled module behind everything that it depends on: source, architecture, compiler. All of that is compared when it
//! is read, so that no two modules can be taken for each other; a file that is cut off, changed or of another program counts as none.
//! Files are written beside their place and renamed, so that ranks that start together read whole files or none.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io, process};

/// The variable that names the folder; empty, nothing is kept.
#[cfg(feature = "cuda")]
pub(crate) const VARIABLE: &str = "AUTOSP_KERNELS";

/// The first line of a file, with the version of its form.
const MAGIC: &str = "autosp kernels 1";

/// What a compiled module depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key<'a> {
    /// The whole text.
    pub(crate) source: &'a str,
    /// Such as `sm_90`.
    pub(crate) architecture: &'a str,
    /// Name, version and options.
    pub(crate) compiler: &'a str,
}

impl Key<'_> {
    /// What stands before the compiled module.
    fn header(self) -> Vec<u8> {
        let Self {
            source,
            architecture,
            compiler,
        } = self;
        let length = source.len();
        format!("{MAGIC}\n{architecture}\n{compiler}\n{length}\n{source}\n").into_bytes()
    }
}

/// A folder of compiled modules.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The folder that [`VARIABLE`] names, else `autosp/kernels` in the user's cache folder, if there is one.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_user() -> Self {
        let [named, caches, home] = [VARIABLE, "XDG_CACHE_HOME", "HOME"].map(env::var_os);
        let folder = folder(named, caches, home);
        Self { folder }
    }

    fn path(&self, header: &[u8]) -> Option<PathBuf> {
        let name = format!("{:016x}.cubin", fnv(header));
        self.folder.as_ref().map(|folder| folder.join(name))
    }

    /// The compiled module, if it is here whole.
    pub(crate) fn get(&self, key: Key<'_>) -> Option<Vec<u8>> {
        let header = key.header();
        let file = fs::read(self.path(&header)?).ok()?;
        let (sum, module) = file.strip_prefix(&header[..])?.split_first_chunk::<8>()?;
        (fnv(module) == u64::from_le_bytes(*sum)).then(|| module.to_vec())
    }

    /// Keeps a compiled module.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn put(&self, key: Key<'_>, module: &[u8]) -> io::Result<()> {
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let mut file = key.header();
        let Some(path) = self.path(&file) else {
            return Ok(());
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        file.extend(fnv(module).to_le_bytes());
        file.extend(module);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let beside = path.with_extension(format!("{}-{number}.part", process::id()));
        let written = fs::write(&beside, file).and_then(|()| fs::rename(&beside, &path));
        if written.is_err() {
            // What cannot be written can perhaps not be removed either; the error of writing says why.
            let _ = fs::remove_file(&beside);
        }
        written
    }
}

/// Where modules are kept, by what variables say.
fn folder(
    named: Option<OsString>,
    caches: Option<OsString>,
    home: Option<OsString>,
) -> Option<PathBuf> {
    let set = |value: Option<OsString>| value.filter(|value| !value.is_empty()).map(PathBuf::from);
    if named.is_some() {
        return set(named);
    }
    let caches = set(caches).or_else(|| set(home).map(|home| home.join(".cache")));
    caches.map(|caches| caches.join("autosp").join("kernels"))
}

/// FNV-1a, 64 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>): names files and finds damage; equality is decided by what it is taken of.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(name: &str) -> (Cache, PathBuf) {
        let folder = env::temp_dir().join(format!("autosp-kernels-{name}-{}", process::id()));
        let _ = fs::remove_dir_all(&folder);
        let cache = Cache {
            folder: Some(folder.join("deep")),
        };
        (cache, folder)
    }

    const KEY: Key<'_> = Key {
        source: "extern \"C\" __global__ void f() {}\n",
        architecture: "sm_90",
        compiler: "NVRTC 13.0 --std=c++17",
    };

    #[test]
    fn the_published_values_of_the_hash() {
        assert_eq!(fnv(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn the_folder_is_the_named_one_or_in_the_users_cache() {
        let some = |text: &str| Some(OsString::from(text));
        let at = |path: &str| Some(PathBuf::from(path));
        assert_eq!(folder(some("/k"), some("/c"), some("/h")), at("/k"));
        assert_eq!(folder(some(""), some("/c"), some("/h")), None);
        assert_eq!(
            folder(None, some("/c"), some("/h")),
            at("/c/autosp/kernels")
        );
        assert_eq!(
            folder(None, some(""), some("/h")),
            at("/h/.cache/autosp/kernels")
        );
        assert_eq!(folder(None, None, None), None);
    }

    #[test]
    fn what_was_put_is_got_and_nothing_else() {
        let (cache, folder) = cache("same");
        assert_eq!(cache.get(KEY), None);
        cache.put(KEY, b"\x7fELF and more").unwrap();
        assert_eq!(cache.get(KEY).unwrap(), b"\x7fELF and more");
        for other in [
            Key {
                source: "int x;",
                ..KEY
            },
            Key {
                architecture: "sm_100",
                ..KEY
            },
            Key {
                compiler: "NVRTC 13.1 --std=c++17",
                ..KEY
            },
        ] {
            assert_eq!(cache.get(other), None);
            cache.put(other, b"other").unwrap();
        }
        assert_eq!(cache.get(KEY).unwrap(), b"\x7fELF and more");
        cache.put(KEY, b"").unwrap();
        assert_eq!(cache.get(KEY).unwrap(), b"");
        let names = fs::read_dir(folder.join("deep")).unwrap();
        let left: Vec<_> = names.map(|f| f.unwrap().path()).collect();
        assert!(
            left.iter()
                .all(|f| f.extension().is_some_and(|e| e == "cubin")),
            "{left:?}"
        );
        assert_eq!(left.len(), 4);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn damaged_and_foreign_files_count_as_none_and_are_written_again() {
        let (cache, folder) = cache("damaged");
        cache.put(KEY, b"a module").unwrap();
        let path = cache.path(&KEY.header()).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(cache.get(KEY), None, "{cut} bytes");
            let mut changed = whole.clone();
            changed[cut] ^= 1;
            fs::write(&path, changed).unwrap();
            assert_eq!(cache.get(KEY), None, "byte {cut}");
        }
        fs::write(&path, b"something else").unwrap();
        assert_eq!(cache.get(KEY), None);
        cache.put(KEY, b"a module").unwrap();
        assert_eq!(cache.get(KEY).unwrap(), b"a module");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn without_a_folder_nothing_is_kept_and_a_file_in_its_place_is_an_error() {
        let none = Cache { folder: None };
        none.put(KEY, b"x").unwrap();
        assert_eq!(none.get(KEY), None);
        let (cache, folder) = cache("file");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("deep"), b"").unwrap();
        assert!(cache.put(KEY, b"x").is_err());
        assert_eq!(cache.get(KEY), None);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn ranks_that_write_at_once_leave_a_whole_file() {
        let (cache, folder) = cache("ranks");
        let module = vec![7; 1 << 16];
        std::thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| {
                    for _ in 0..20 {
                        cache.put(KEY, &module).unwrap();
                        assert_eq!(cache.get(KEY).as_ref(), Some(&module));
                    }
                });
            }
        });
        fs::remove_dir_all(folder).unwrap();
    }
}
