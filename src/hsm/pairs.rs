//! PKCS#11 operations on device key pairs: generation, wrapping for storage and for delivery, rewrapping to another batch key.

use std::time::{Duration, Instant};

use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType as CkKeyType, ObjectClass, ObjectHandle};
use spp_format::keys::KeyType;
use spp_format::names::KeyName;
use zeroize::Zeroizing;

use super::attributes::pair_generation;
use super::failure::{Failure, FailureContext as _};
use super::failure_class::FailureClass;
use super::module::WrapMechanism;
use super::operations::TokenOperations;
use super::wire::{Answer, MadePair, StorageTarget, StoredForm, WirePublicKey};

/// Bytes of the IV of AES-CBC.
pub(super) const IV_LEN: usize = 16;
/// Bytes of the IV of AES-GCM.
pub(super) const GCM_IV_LEN: usize = 12;

fn gcm(iv: &mut [u8; GCM_IV_LEN]) -> cryptoki::error::Result<Mechanism<'_>> {
    Ok(Mechanism::AesGcm(GcmParams::new(iv, &[], 128.into())?))
}

impl TokenOperations {
    pub(super) fn generate_pair(&mut self, kind: KeyType, wrapping_key: &KeyName) -> Result<Answer, Failure> {
        self.with_session_pair(kind, |operations, public, private| {
            let batch_key = operations.key(wrapping_key)?;
            // A pair that cannot be unwrapped again must never get a certificate. The receiver checks the delivered key, which
            // detects a module that always wraps such keys wrongly; wrapping twice detects a single fault.
            let stored = operations.wrap_under(batch_key, private)?;
            let delivered = match operations.shared.module.wrap {
                WrapMechanism::AesKeyWrapPad => {
                    if operations.wrap_under(batch_key, private)? != stored {
                        let message = format!("wrapping a {kind} key twice gave two different results");
                        return Err(Failure::new(FailureClass::ModuleLost, message));
                    }
                    operations.wrap_under(operations.transport()?, private)?
                }
                // Two results differ because of their random IVs, so the stored key is unwrapped again for the delivery.
                WrapMechanism::AesGcm | WrapMechanism::AesCbcPad => operations.rewrap(kind, wrapping_key, &stored)?,
            };
            Ok(Answer::Pair { public, stored, delivered })
        })
    }

    /// Generates at least one pair, then more until `within` has elapsed. Pairs to be wrapped are session objects; pairs on the
    /// token are synced before they are returned.
    pub(super) fn make_pairs(
        &mut self,
        kind: KeyType,
        target: &StorageTarget,
        at_most: u32,
        within: Duration,
    ) -> Result<Vec<MadePair>, Failure> {
        let (started, started_at) = (Instant::now(), std::time::SystemTime::now());
        let mut made = Vec::new();
        while made.is_empty() || (made.len() < at_most as usize && started.elapsed() < within) {
            made.push(match target {
                StorageTarget::Wrapped(key) => self.with_session_pair(kind, |operations, public, private| {
                    let batch_key = operations.key(key)?;
                    let blob = operations.wrap_under(batch_key, private)?;
                    if operations.shared.module.wrap != WrapMechanism::AesKeyWrapPad {
                        operations.rewrap(kind, key, &blob)?;
                    }
                    Ok(MadePair { public, stored: StoredForm::Blob(blob) })
                })?,
                StorageTarget::OnToken(label) => self.make_token_pair(kind, label)?,
            });
        }
        if matches!(target, StorageTarget::OnToken(_)) {
            self.sync_objects(started_at)?;
        }
        Ok(made)
    }

    /// Generates a session pair, runs `work` on it, and destroys the pair whether or not `work` succeeds.
    pub(super) fn with_session_pair<T>(
        &mut self,
        kind: KeyType,
        work: impl FnOnce(&mut Self, WirePublicKey, ObjectHandle) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if self.shared.module.unwrappable.contains(&kind) {
            let (public, seed) = self.seed_outside(kind)?;
            let object = self.session_secret(CkKeyType::GENERIC_SECRET, &seed)?;
            let result = work(self, public, object);
            self.destroy_session_object(object)?;
            return result;
        }
        let (mechanism, mut public_template) = pair_generation(kind);
        public_template.extend([Attribute::Token(false), Attribute::Verify(true)]);
        let private_template = [
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(true),
            // Only the device signs with this key.
            Attribute::Sign(false),
        ];
        let (public, private) = self
            .session
            .generate_key_pair(&mechanism, &public_template, &private_template)
            .context(|| format!("generating a {kind} pair"))?;
        let result = self.public_key(kind, public).and_then(|public_key| work(self, public_key, private));
        self.destroy_session_object(private)?;
        self.destroy_session_object(public)?;
        result
    }

    /// Generates a pair of a key type that the module cannot wrap: the HSM provides a random seed, the worker computes the public
    /// key, and the caller imports the seed as a generic secret to wrap it.
    pub(super) fn seed_outside(&self, kind: KeyType) -> Result<(WirePublicKey, Zeroizing<Vec<u8>>), Failure> {
        if kind != KeyType::Ed25519 {
            let message = format!("the module cannot wrap {kind} keys; only ed25519 keys can be generated outside it");
            return Err(Failure::new(FailureClass::Rejected, message));
        }
        let seed = Zeroizing::new(self.random(32)?);
        let pair = aws_lc_rs::signature::Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|e| Failure::new(FailureClass::Transient, format!("generating an ed25519 pair: {e}")))?;
        let public = aws_lc_rs::signature::KeyPair::public_key(&pair).as_ref().to_vec();
        Ok((WirePublicKey::Ed25519(public), seed))
    }

    /// Imports bytes as a session object that can be wrapped.
    pub(super) fn session_secret(&self, key_type: CkKeyType, bytes: &[u8]) -> Result<ObjectHandle, Failure> {
        let mut template = secret_template(key_type);
        // cryptoki does not wipe the attribute: a copy of the bytes remains on the heap until the memory is reused.
        template.push(Attribute::Value(bytes.to_vec()));
        self.session.create_object(&template).context(|| "importing a secret".to_owned())
    }

    pub(super) fn wrap_under(&self, wrapping: ObjectHandle, object: ObjectHandle) -> Result<Vec<u8>, Failure> {
        let context = || "wrapping a key".to_owned();
        match self.shared.module.wrap {
            WrapMechanism::AesKeyWrapPad => {
                self.session.wrap_key(&Mechanism::AesKeyWrapPad, wrapping, object).context(context)
            }
            WrapMechanism::AesCbcPad => {
                let mut iv = [0; IV_LEN];
                self.session.generate_random_slice(&mut iv).context(context)?;
                let wrapped = self.session.wrap_key(&Mechanism::AesCbcPad(iv), wrapping, object).context(context)?;
                Ok([&iv[..], &wrapped].concat())
            }
            WrapMechanism::AesGcm => {
                let mut iv = [0; GCM_IV_LEN];
                self.session.generate_random_slice(&mut iv).context(context)?;
                let mut used = iv;
                let wrapped =
                    self.session.wrap_key(&gcm(&mut used).context(context)?, wrapping, object).context(context)?;
                // A module that generates the IV itself writes it here.
                Ok([&used[..], &wrapped].concat())
            }
        }
    }

    fn unwrap_under(
        &self,
        wrapping: ObjectHandle,
        blob: &[u8],
        template: &[Attribute],
        context: impl FnOnce() -> String,
    ) -> Result<ObjectHandle, Failure> {
        let short =
            |context: String| Failure::new(FailureClass::Rejected, format!("{context}: wrapped key is too short"));
        let unwrap =
            |mechanism: &Mechanism<'_>, wrapped: &[u8]| self.session.unwrap_key(mechanism, wrapping, wrapped, template);
        let unwrapped = match self.shared.module.wrap {
            WrapMechanism::AesKeyWrapPad => unwrap(&Mechanism::AesKeyWrapPad, blob),
            WrapMechanism::AesCbcPad => match blob.split_first_chunk::<IV_LEN>() {
                Some((iv, wrapped)) => unwrap(&Mechanism::AesCbcPad(*iv), wrapped),
                None => return Err(short(context())),
            },
            WrapMechanism::AesGcm => match blob.split_first_chunk::<GCM_IV_LEN>() {
                Some((iv, wrapped)) => gcm(&mut { *iv }).and_then(|mechanism| unwrap(&mechanism, wrapped)),
                None => return Err(short(context())),
            },
        };
        unwrapped.context(context)
    }

    pub(super) fn rewrap(&mut self, kind: KeyType, wrapping_key: &KeyName, blob: &[u8]) -> Result<Vec<u8>, Failure> {
        let transport = self.transport()?;
        self.rewrap_under(kind, wrapping_key, transport, blob)
    }

    /// Rewraps keys from one wrapping key to another. The keys are in clear only inside the HSM.
    pub(super) fn move_keys(
        &mut self,
        from: &KeyName,
        to: &KeyName,
        blobs: &[(KeyType, Vec<u8>)],
    ) -> Result<Vec<Vec<u8>>, Failure> {
        let target = self.key(to)?;
        blobs.iter().map(|(kind, blob)| self.rewrap_under(*kind, from, target, blob)).collect()
    }

    fn rewrap_under(
        &mut self,
        kind: KeyType,
        from: &KeyName,
        to: ObjectHandle,
        blob: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let unwrapping_key = self.key(from)?;
        let mut template = if self.shared.module.unwrappable.contains(&kind) {
            secret_template(CkKeyType::GENERIC_SECRET)
        } else {
            let key_type = match kind {
                KeyType::P256 | KeyType::P384 => CkKeyType::EC,
                KeyType::Ed25519 => CkKeyType::EC_EDWARDS,
                KeyType::Rsa2048 | KeyType::Rsa3072 | KeyType::Rsa4096 => CkKeyType::RSA,
            };
            let mut template = secret_template(key_type);
            template[0] = Attribute::Class(ObjectClass::PRIVATE_KEY);
            template
        };
        if self.shared.module.unwraps_extractable {
            template.retain(|attribute| *attribute != Attribute::Extractable(true));
        }
        let object =
            self.unwrap_under(unwrapping_key, blob, &template, || format!("unwrapping a {kind} key under {from}"))?;
        let rewrapped = self.wrap_under(to, object);
        self.destroy_session_object(object)?;
        rewrapped
    }

    pub(super) fn public_key(&self, kind: KeyType, object: ObjectHandle) -> Result<WirePublicKey, Failure> {
        let context = || "reading a new public key".to_owned();
        let missing = || Failure::new(FailureClass::Rejected, "the module does not return the new public key");
        if kind.rsa_bits().is_some() {
            let wanted = [AttributeType::Modulus, AttributeType::PublicExponent];
            let found = self.session.get_attributes(object, &wanted).context(context)?;
            let (mut modulus, mut exponent) = (None, None);
            for attribute in found {
                match attribute {
                    Attribute::Modulus(bytes) => modulus = Some(bytes),
                    Attribute::PublicExponent(bytes) => exponent = Some(bytes),
                    _ => {}
                }
            }
            let (modulus, exponent) = modulus.zip(exponent).ok_or_else(missing)?;
            return Ok(WirePublicKey::Rsa { modulus, exponent });
        }
        let found = self.session.get_attributes(object, &[AttributeType::EcPoint]).context(context)?;
        let Some(Attribute::EcPoint(point)) = found.into_iter().next() else { return Err(missing()) };
        let point = raw_point(point);
        Ok(if kind == KeyType::Ed25519 { WirePublicKey::Ed25519(point) } else { WirePublicKey::Ec(point) })
    }

    /// Generates a pair as token objects. The caller has checked that label and CKA_ID are unused.
    pub(crate) fn create_token_pair(
        &self,
        kind: KeyType,
        public_template: &[Attribute],
        private_template: &[Attribute],
    ) -> Result<WirePublicKey, Failure> {
        let (mechanism, mut public) = pair_generation(kind);
        public.extend_from_slice(public_template);
        let (object, _) = self
            .session
            .generate_key_pair(&mechanism, &public, private_template)
            .context(|| format!("generating a {kind} pair on the token"))?;
        self.public_key(kind, object)
    }
}

/// The template of a temporary session object for a secret.
fn secret_template(key_type: CkKeyType) -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(key_type),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(true),
    ]
}

/// Extracts the point from CKA_EC_POINT, a DER OCTET STRING (PKCS#11 v2.40 §2.3.3). Some modules return the bare point.
fn raw_point(point: Vec<u8>) -> Vec<u8> {
    use der::Decode as _;
    match <&der::asn1::OctetStringRef>::from_der(&point) {
        Ok(inner) => inner.as_bytes().to_vec(),
        Err(_) => point,
    }
}
