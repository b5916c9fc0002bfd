//! The ceremony file: its shape, and the acts that it asks for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::backup::NewBackupKey;
use super::backup_file::BackupFile;
use super::destroy::DestroyKey;
use super::import::ImportCertificate;
use super::log::NewLogKey;
use super::master::{Line, NewMasterKey};
use super::proof::CheckKey;
use super::restore::RestoreKey;
use super::signing_file::{AccessShape, RotateSigningShape, RouteShape, SigningShape};
use super::{Act, CeremonyPlan};
use crate::config::{Faults, read_toml};
use crate::hsm::{Prf, SigningUse};
use crate::keys::sha256;
use crate::names::{KeyName, OfficerName};
use crate::tlog::Origin;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    token: Option<TokenShape>,
    #[serde(default)]
    backup_wrapping_key: Vec<BackupKeyShape>,
    #[serde(default)]
    restore: Vec<RestoreShape>,
    #[serde(default)]
    signing_key: Vec<SigningShape>,
    #[serde(default)]
    rotate_signing_key: Vec<RotateSigningShape>,
    access_ca: Option<AccessShape>,
    #[serde(default)]
    log_key: Vec<LogShape>,
    #[serde(default)]
    master_key: Vec<MasterShape>,
    #[serde(default)]
    rotate_master_key: Vec<RotateMasterShape>,
    #[serde(default)]
    import_certificate: Vec<ImportShape>,
    #[serde(default)]
    check_value: Vec<CheckShape>,
    #[serde(default)]
    destroy: Vec<DestroyShape>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenShape {
    label: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BackupKeyShape {
    name: KeyName,
    shares: u8,
    threshold: u8,
    officers: Vec<OfficerName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RestoreShape {
    file: PathBuf,
    shares: Vec<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogShape {
    name: KeyName,
    origin: Origin,
    backup: Option<KeyName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MasterShape {
    name: KeyName,
    version: u32,
    prf: Prf,
    backup: Option<KeyName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RotateMasterShape {
    key: KeyName,
    name: KeyName,
    backup: Option<KeyName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportShape {
    key: KeyName,
    file: PathBuf,
    root: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckShape {
    key: KeyName,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DestroyShape {
    key: KeyName,
    fingerprint: Option<String>,
    check_value: Option<String>,
}

impl CeremonyPlan {
    /// Reads a ceremony file; unknown keys are refused, every fault is reported at once. Paths in it are relative to its directory.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let text = faults.note(&place, std::fs::read_to_string(path)).unwrap_or_default();
        let shape: Option<Shape> = if faults.is_empty() { read_toml(&place, &text, &mut faults) } else { None };
        let plan = shape.map(|mut shape| {
            let token = shape.token.take().map(|token| token.label);
            if token.as_ref().is_some_and(|label| label.is_empty() || label.len() > 32) {
                faults.add(format!("{place}: token: label"), "must have 1 to 32 characters");
            }
            let base = path.parent().unwrap_or(Path::new(""));
            let acts = shape.check(&mut Check { place: &place, base, faults: &mut faults });
            if token.is_some() && acts.iter().any(|act| act.needs_approval(None).is_some()) {
                faults.add(format!("{place}: token"), "a token that is initialised has no key to rotate or to destroy");
            }
            Self { token, acts, file: path.to_owned(), file_hash: sha256(text.as_bytes()) }
        });
        faults.ok_or_all(plan)
    }
}

/// What every check needs.
pub(super) struct Check<'a> {
    pub(super) place: &'a str,
    base: &'a Path,
    pub(super) faults: &'a mut Faults,
}

impl Shape {
    /// The acts in the order in which they are done: what others need comes first, what cannot be undone last.
    fn check(self, check: &mut Check<'_>) -> Vec<Box<dyn Act>> {
        self.refer_rightly(check);
        let mut acts: Vec<Box<dyn Act>> = Vec::new();
        for key in self.backup_wrapping_key {
            acts.push(Box::new(key.check(check)));
        }
        for key in self.restore {
            acts.extend(key.check(check).map(|key| Box::new(key) as Box<dyn Act>));
        }
        let (roots, others): (Vec<_>, Vec<_>) =
            self.signing_key.into_iter().partition(|key| key.use_ == SigningUse::Root);
        let signing = roots.into_iter().chain(others).map(SigningShape::common);
        let signing = signing.chain(self.rotate_signing_key.into_iter().map(RotateSigningShape::common));
        for key in signing.chain(self.access_ca.map(AccessShape::common)) {
            acts.extend(key.check(check).map(|key| Box::new(key) as Box<dyn Act>));
        }
        for LogShape { name, origin, backup } in self.log_key {
            acts.push(Box::new(NewLogKey { name, origin, backup }));
        }
        for MasterShape { name, version, prf, backup } in self.master_key {
            if version == 0 {
                check.fault(format!("master_key {name}: version"), "versions are counted from 1");
            }
            acts.push(Box::new(NewMasterKey { name, line: Line::Begins { version, prf }, backup }));
        }
        for RotateMasterShape { key, name, backup } in self.rotate_master_key {
            acts.push(Box::new(NewMasterKey { name, line: Line::GoesOn(key), backup }));
        }
        for ImportShape { key, file, root } in self.import_certificate {
            acts.push(Box::new(ImportCertificate { key, file: check.base.join(file), root: check.base.join(root) }));
        }
        for CheckShape { key } in self.check_value {
            acts.push(Box::new(CheckKey { key }));
        }
        for key in self.destroy {
            acts.extend(key.check(check).map(|key| Box::new(key) as Box<dyn Act>));
        }
        if acts.is_empty() && check.faults.is_empty() {
            let problem = "asks for nothing; add a [[signing_key]], [[log_key]], [[master_key]] or [access_ca]";
            check.faults.add(check.place, problem);
        }
        names_are_unique(&acts, check);
        acts
    }

    /// What names another key of the file names one that can do what is wanted of it.
    fn refer_rightly(&self, check: &mut Check<'_>) {
        let wrapping: BTreeSet<_> = self.backup_wrapping_key.iter().map(|key| &key.name).collect();
        let signing = self.signing_key.iter().map(|key| (&key.name, key.use_ == SigningUse::Root));
        let signing: Vec<_> = signing.chain(self.rotate_signing_key.iter().map(|key| (&key.name, false))).collect();
        let log = self.log_key.iter().map(|key| (&key.name, key.backup.as_ref()));
        let master = self.master_key.iter().map(|key| (&key.name, key.backup.as_ref()));
        let others: Vec<_> = log.chain(master).collect();
        let all: BTreeSet<_> =
            signing.iter().map(|(name, _)| *name).chain(others.iter().map(|(name, _)| *name)).collect();
        let rotated = self.rotate_master_key.iter().map(|key| (&key.name, key.backup.as_ref()));
        let of_signing = self.signing_key.iter().map(|key| (&key.name, key.backup.as_ref()));
        let of_rotated = self.rotate_signing_key.iter().map(|key| (&key.name, key.backup.as_ref()));
        for (name, under) in others.iter().copied().chain(rotated).chain(of_signing).chain(of_rotated) {
            if under.is_some_and(|under| all.contains(under) && !wrapping.contains(under)) {
                check.fault(format!("{name}: backup"), "must name a [[backup_wrapping_key]]");
            }
        }
        self.issuers_can_issue(&wrapping, check);
        let mut rotated = BTreeSet::new();
        let older = self.rotate_signing_key.iter().map(|key| &key.key);
        for key in older.chain(self.rotate_master_key.iter().map(|key| &key.key)) {
            if !rotated.insert(key) {
                check.fault(key.to_string(), "is rotated twice");
            }
        }
    }
}

impl Shape {
    /// Whether those that the file names as issuers, and makes itself, have their certificates by then.
    fn issuers_can_issue(&self, wrapping: &BTreeSet<&KeyName>, check: &mut Check<'_>) {
        let issued = self.signing_key.iter().map(|key| (&key.name, key.issuer.as_ref()));
        let issued = issued.chain(self.rotate_signing_key.iter().map(|key| (&key.name, key.issuer.as_ref())));
        for (name, issuer) in issued.filter_map(|(name, issuer)| Some((name, issuer?))) {
            let new = self.signing_key.iter().find(|key| key.name == *issuer);
            let rotated = self.rotate_signing_key.iter().any(|key| key.name == *issuer);
            let at = format!("{name}: issuer");
            match new {
                _ if rotated || wrapping.contains(issuer) => {
                    check.fault(at, "must name a [[signing_key]] with use = \"root\"");
                }
                Some(key) if key.use_ != SigningUse::Root => {
                    check.fault(at, "must name a [[signing_key]] with use = \"root\"");
                }
                Some(key) if key.certificate == RouteShape::Csr => {
                    let problem = format!(
                        "{issuer} has no certificate before the root above it has answered: import that first, in a \
                                           ceremony of its own"
                    );
                    check.fault(at, problem);
                }
                _ => {}
            }
        }
    }
}

fn names_are_unique(acts: &[Box<dyn Act>], check: &mut Check<'_>) {
    let (mut names, mut files) = (BTreeSet::new(), BTreeSet::new());
    for act in acts {
        if let Some(name) = act.gives().filter(|name| !names.insert((*name).clone())) {
            check.faults.add(check.place, format!("the name {name} is there twice"));
        }
        for file in act.files() {
            if !files.insert(file.clone()) {
                check.faults.add(check.place, format!("the file {} would be written twice", file.display()));
            }
        }
    }
}

impl Check<'_> {
    pub(super) fn fault(&mut self, at: impl std::fmt::Display, problem: impl std::fmt::Display) {
        self.faults.add(format!("{}: {at}", self.place), problem);
    }
}

impl BackupKeyShape {
    fn check(self, check: &mut Check<'_>) -> NewBackupKey {
        let Self { name, shares, threshold, officers } = self;
        let key = NewBackupKey { name, threshold, officers };
        key.check(shares, &format!("{}: backup_wrapping_key {}", check.place, key.name), check.faults);
        key
    }
}

impl RestoreShape {
    fn check(self, check: &mut Check<'_>) -> Option<RestoreKey> {
        let file = check.base.join(self.file);
        let backup = check.faults.keep(BackupFile::load(&file))?;
        let shares = self.shares.iter().map(|share| check.base.join(share)).collect();
        Some(RestoreKey { backup, file, shares })
    }
}

impl DestroyShape {
    fn check(self, check: &mut Check<'_>) -> Option<DestroyKey> {
        match (self.fingerprint, self.check_value) {
            (Some(known_by), None) | (None, Some(known_by)) => Some(DestroyKey { key: self.key, known_by }),
            _ => {
                let problem = "give the key's fingerprint (of a key pair) or its check_value (of a secret key), as its transcript \
                               has it";
                check.fault(format!("destroy {}", self.key), problem);
                None
            }
        }
    }
}
