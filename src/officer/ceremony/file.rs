//! Parses and validates ceremony files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use spp_format::file_format::{Faults, read_toml};
use spp_format::keys::sha256;
use spp_format::names::{KeyName, OfficerName};
use spp_format::tlog::Origin;

use super::CeremonyPlan;
use super::backup::NewBackupKey;
use super::backup_file::BackupFile;
use super::check::CheckKey;
use super::destroy::DestroyKey;
use super::import::ImportCertificate;
use super::log::NewLogKey;
use super::master::{Lineage, NewMasterKey};
use super::parse_context::ParseContext;
use super::restore::RestoreKey;
use super::signing_file::{AccessShape, CertificateSourceShape, RotateSigningShape, SigningShape};
use super::step::Step;
use crate::hsm::{Prf, SigningUse};

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
    /// Reads a ceremony file. Unknown keys are refused and all faults are reported at once. Paths are relative to the file's
    /// directory.
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
            let steps = shape.check(&mut ParseContext { place: &place, base, faults: &mut faults });
            if token.is_some() && steps.iter().any(|step| step.needs_approval(None).is_some()) {
                faults.add(format!("{place}: token"), "a newly initialised token has no key to rotate or destroy");
            }
            Self { token, steps, file: path.to_owned(), file_hash: sha256(text.as_bytes()) }
        });
        faults.into_result(plan)
    }
}

impl Shape {
    /// The steps in execution order: dependencies first, irreversible steps last.
    fn check(self, context: &mut ParseContext<'_>) -> Vec<Box<dyn Step>> {
        self.check_references(context);
        let mut steps: Vec<Box<dyn Step>> = Vec::new();
        for key in self.backup_wrapping_key {
            steps.push(Box::new(key.check(context)));
        }
        for key in self.restore {
            steps.extend(key.check(context).map(|key| Box::new(key) as Box<dyn Step>));
        }
        let (roots, others): (Vec<_>, Vec<_>) =
            self.signing_key.into_iter().partition(|key| key.use_ == SigningUse::Root);
        let signing = roots.into_iter().chain(others).map(SigningShape::common);
        let signing = signing.chain(self.rotate_signing_key.into_iter().map(RotateSigningShape::common));
        for key in signing.chain(self.access_ca.map(AccessShape::common)) {
            steps.extend(key.check(context).map(|key| Box::new(key) as Box<dyn Step>));
        }
        for LogShape { name, origin, backup } in self.log_key {
            steps.push(Box::new(NewLogKey { name, origin, backup }));
        }
        for MasterShape { name, version, prf, backup } in self.master_key {
            if version == 0 {
                context.fault(format!("master_key {name}: version"), "must be at least 1");
            }
            steps.push(Box::new(NewMasterKey { name, lineage: Lineage::New { version, prf }, backup }));
        }
        for RotateMasterShape { key, name, backup } in self.rotate_master_key {
            steps.push(Box::new(NewMasterKey { name, lineage: Lineage::Replaces(key), backup }));
        }
        for ImportShape { key, file, root } in self.import_certificate {
            steps.push(Box::new(ImportCertificate {
                key,
                file: context.base.join(file),
                root: context.base.join(root),
            }));
        }
        for CheckShape { key } in self.check_value {
            steps.push(Box::new(CheckKey { key }));
        }
        for key in self.destroy {
            steps.extend(key.check(context).map(|key| Box::new(key) as Box<dyn Step>));
        }
        if steps.is_empty() && context.faults.is_empty() {
            let problem =
                "contains no step; add for example a [[signing_key]], [[log_key]], [[master_key]] or [access_ca]";
            context.faults.add(context.place, problem);
        }
        check_unique_names(&steps, context);
        steps
    }

    /// Checks that keys referenced within the file have the right type.
    fn check_references(&self, context: &mut ParseContext<'_>) {
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
                context.fault(format!("{name}: backup"), "must name a [[backup_wrapping_key]]");
            }
        }
        self.check_issuers(&wrapping, context);
        let mut rotated = BTreeSet::new();
        let replaced = self.rotate_signing_key.iter().map(|key| &key.key);
        for key in replaced.chain(self.rotate_master_key.iter().map(|key| &key.key)) {
            if !rotated.insert(key) {
                context.fault(key.to_string(), "is rotated twice");
            }
        }
    }
}

impl Shape {
    /// Checks that issuers created by the file have their certificates before they issue.
    fn check_issuers(&self, wrapping: &BTreeSet<&KeyName>, context: &mut ParseContext<'_>) {
        let issued = self.signing_key.iter().map(|key| (&key.name, key.issuer.as_ref()));
        let issued = issued.chain(self.rotate_signing_key.iter().map(|key| (&key.name, key.issuer.as_ref())));
        for (name, issuer) in issued.filter_map(|(name, issuer)| Some((name, issuer?))) {
            let new = self.signing_key.iter().find(|key| key.name == *issuer);
            let rotated = self.rotate_signing_key.iter().any(|key| key.name == *issuer);
            let at = format!("{name}: issuer");
            match new {
                _ if rotated || wrapping.contains(issuer) => {
                    context.fault(at, "must name a [[signing_key]] with use = \"root\"");
                }
                Some(key) if key.use_ != SigningUse::Root => {
                    context.fault(at, "must name a [[signing_key]] with use = \"root\"");
                }
                Some(key) if key.certificate == CertificateSourceShape::Csr => {
                    let problem = format!(
                        "{issuer} has no certificate until its offline root has issued it: import that first, in a \
                                           separate ceremony"
                    );
                    context.fault(at, problem);
                }
                _ => {}
            }
        }
    }
}

fn check_unique_names(steps: &[Box<dyn Step>], context: &mut ParseContext<'_>) {
    let (mut names, mut files) = (BTreeSet::new(), BTreeSet::new());
    for step in steps {
        if let Some(name) = step.created_key().filter(|name| !names.insert((*name).clone())) {
            context.faults.add(context.place, format!("name {name} is used twice"));
        }
        for file in step.files() {
            if !files.insert(file.clone()) {
                context.faults.add(context.place, format!("file {} would be written twice", file.display()));
            }
        }
    }
}

impl BackupKeyShape {
    fn check(self, context: &mut ParseContext<'_>) -> NewBackupKey {
        let Self { name, shares, threshold, officers } = self;
        let key = NewBackupKey { name, threshold, officers };
        key.check(shares, &format!("{}: backup_wrapping_key {}", context.place, key.name), context.faults);
        key
    }
}

impl RestoreShape {
    fn check(self, context: &mut ParseContext<'_>) -> Option<RestoreKey> {
        let file = context.base.join(self.file);
        let backup = context.faults.merge(BackupFile::load(&file))?;
        let shares = self.shares.iter().map(|share| context.base.join(share)).collect();
        Some(RestoreKey { backup, file, shares })
    }
}

impl DestroyShape {
    fn check(self, context: &mut ParseContext<'_>) -> Option<DestroyKey> {
        match (self.fingerprint, self.check_value) {
            (Some(fingerprint), None) | (None, Some(fingerprint)) => Some(DestroyKey { key: self.key, fingerprint }),
            _ => {
                let problem = "give the key's fingerprint (key pair) or check_value (secret key) from its transcript";
                context.fault(format!("destroy {}", self.key), problem);
                None
            }
        }
    }
}
