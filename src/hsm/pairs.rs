//! Pairs of devices, in PKCS#11: made, wrapped for keeping and for delivery, moved from one batch to the next, forgotten.

use std::time::{Duration, Instant};

use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use zeroize::Zeroizing;

use super::attributes::pair_generation;
use super::failure::{Doing as _, Failure, FailureClass};
use super::module::WrapMechanism;
use super::operations::TokenOperations;
use super::wire::{Answer, Keep, Kept, MadePair, WirePublicKey};
use crate::keys::KeyKind;
use crate::names::KeyName;

/// Bytes of the IV of AES-CBC.
pub(super) const IV_LEN: usize = 16;
/// Bytes of the IV of AES-GCM.
pub(super) const GCM_IV_LEN: usize = 12;

fn gcm(iv: &mut [u8; GCM_IV_LEN]) -> cryptoki::error::Result<Mechanism<'_>> {
    Ok(Mechanism::AesGcm(GcmParams::new(iv, &[], 128.into())?))
}

impl TokenOperations {
    pub(super) fn generate_pair(&mut self, kind: KeyKind, wrapping_key: &KeyName) -> Result<Answer, Failure> {
        self.with_session_pair(kind, |verbs, public, private| {
            let keeping = verbs.key(wrapping_key)?;
            // A pair that could not be had again must never get a certificate. What is delivered is checked by who receives it, so that
            // a module that wraps such keys wrongly is found; a single mistake is found by wrapping twice.
            let kept = verbs.wrap_under(keeping, private)?;
            let delivered = match verbs.shared.module.wrap {
                WrapMechanism::AesKeyWrapPad => {
                    if verbs.wrap_under(keeping, private)? != kept {
                        let message = format!("the HSM wrapped one {kind} key in two ways");
                        return Err(Failure::new(FailureClass::ModuleLost, message));
                    }
                    verbs.wrap_under(verbs.transport()?, private)?
                }
                // With a random IV no two are the same: what is delivered goes through what is kept.
                WrapMechanism::AesGcm | WrapMechanism::AesCbcPad => verbs.rewrap(kind, wrapping_key, &kept)?,
            };
            Ok(Answer::Pair { public, kept, delivered })
        })
    }

    /// One, then as many as the time allows. Wrapped ones are session objects in between; those on the token are synced before
    /// anybody hears of them.
    pub(super) fn make_pairs(
        &mut self,
        kind: KeyKind,
        keep: &Keep,
        at_most: u32,
        within: Duration,
    ) -> Result<Vec<MadePair>, Failure> {
        let begun = (Instant::now(), std::time::SystemTime::now());
        let mut made = Vec::new();
        while made.is_empty() || (made.len() < at_most as usize && begun.0.elapsed() < within) {
            made.push(match keep {
                Keep::Wrapped(key) => self.with_session_pair(kind, |verbs, public, private| {
                    let keeping = verbs.key(key)?;
                    let blob = verbs.wrap_under(keeping, private)?;
                    if verbs.shared.module.wrap != WrapMechanism::AesKeyWrapPad {
                        verbs.rewrap(kind, key, &blob)?;
                    }
                    Ok(MadePair { public, kept: Kept::Blob(blob) })
                })?,
                Keep::OnToken(label) => self.make_token_pair(kind, label)?,
            });
        }
        if matches!(keep, Keep::OnToken(_)) {
            self.sync_objects(begun.1)?;
        }
        Ok(made)
    }

    /// Makes a session pair, does something with it, and forgets it whatever came of that.
    pub(super) fn with_session_pair<T>(
        &mut self,
        kind: KeyKind,
        work: impl FnOnce(&mut Self, WirePublicKey, ObjectHandle) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if self.shared.module.unwrappable.contains(&kind) {
            let (public, seed) = self.seed_outside(kind)?;
            let object = self.session_secret(KeyType::GENERIC_SECRET, &seed)?;
            let done = work(self, public, object);
            self.forget(object)?;
            return done;
        }
        let (mechanism, mut public_template) = pair_generation(kind);
        public_template.extend([Attribute::Token(false), Attribute::Verify(true)]);
        let private_template = [
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(true),
            // Only its device signs with it.
            Attribute::Sign(false),
        ];
        let (public, private) = self
            .session
            .generate_key_pair(&mechanism, &public_template, &private_template)
            .doing(|| format!("generating a {kind} pair"))?;
        let done = self.public_key(kind, public).and_then(|shown| work(self, shown, private));
        self.forget(private)?;
        self.forget(public)?;
        done
    }

    /// For kinds that the module cannot wrap: the seed is drawn in the HSM, the pair is made here, and the seed goes back in
    /// as a generic secret, to be wrapped.
    pub(super) fn seed_outside(&self, kind: KeyKind) -> Result<(WirePublicKey, Zeroizing<Vec<u8>>), Failure> {
        if kind != KeyKind::Ed25519 {
            let message = format!("the module cannot wrap {kind} keys, and only ed25519 can be made outside it");
            return Err(Failure::new(FailureClass::Rejected, message));
        }
        let seed = Zeroizing::new(self.random(32)?);
        let pair = aws_lc_rs::signature::Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|e| Failure::new(FailureClass::Transient, format!("making an ed25519 pair: {e}")))?;
        let public = aws_lc_rs::signature::KeyPair::public_key(&pair).as_ref().to_vec();
        Ok((WirePublicKey::Ed25519(public), seed))
    }

    /// Bytes as a session object that can be wrapped.
    pub(super) fn session_secret(&self, key_type: KeyType, bytes: &[u8]) -> Result<ObjectHandle, Failure> {
        let mut template = secret_template(key_type);
        // cryptoki's attribute is not wiped: a copy of the bytes stays in the process's heap until it is reused.
        template.push(Attribute::Value(bytes.to_vec()));
        self.session.create_object(&template).doing(|| "importing a secret".to_owned())
    }

    pub(super) fn wrap_under(&self, wrapping: ObjectHandle, object: ObjectHandle) -> Result<Vec<u8>, Failure> {
        let doing = || "wrapping a key".to_owned();
        match self.shared.module.wrap {
            WrapMechanism::AesKeyWrapPad => {
                self.session.wrap_key(&Mechanism::AesKeyWrapPad, wrapping, object).doing(doing)
            }
            WrapMechanism::AesCbcPad => {
                let mut iv = [0; IV_LEN];
                self.session.generate_random_slice(&mut iv).doing(doing)?;
                let wrapped = self.session.wrap_key(&Mechanism::AesCbcPad(iv), wrapping, object).doing(doing)?;
                Ok([&iv[..], &wrapped].concat())
            }
            WrapMechanism::AesGcm => {
                let mut iv = [0; GCM_IV_LEN];
                self.session.generate_random_slice(&mut iv).doing(doing)?;
                let mut used = iv;
                let wrapped = self.session.wrap_key(&gcm(&mut used).doing(doing)?, wrapping, object).doing(doing)?;
                // A module that takes an IV of its own would write it here.
                Ok([&used[..], &wrapped].concat())
            }
        }
    }

    fn unwrap_under(
        &self,
        wrapping: ObjectHandle,
        blob: &[u8],
        template: &[Attribute],
        doing: impl FnOnce() -> String,
    ) -> Result<ObjectHandle, Failure> {
        let short = |doing: String| Failure::new(FailureClass::Rejected, format!("{doing}: it is too short"));
        let unwrap =
            |mechanism: &Mechanism<'_>, wrapped: &[u8]| self.session.unwrap_key(mechanism, wrapping, wrapped, template);
        let unwrapped = match self.shared.module.wrap {
            WrapMechanism::AesKeyWrapPad => unwrap(&Mechanism::AesKeyWrapPad, blob),
            WrapMechanism::AesCbcPad => match blob.split_first_chunk::<IV_LEN>() {
                Some((iv, wrapped)) => unwrap(&Mechanism::AesCbcPad(*iv), wrapped),
                None => return Err(short(doing())),
            },
            WrapMechanism::AesGcm => match blob.split_first_chunk::<GCM_IV_LEN>() {
                Some((iv, wrapped)) => gcm(&mut { *iv }).and_then(|mechanism| unwrap(&mechanism, wrapped)),
                None => return Err(short(doing())),
            },
        };
        unwrapped.doing(doing)
    }

    pub(super) fn rewrap(&mut self, kind: KeyKind, wrapping_key: &KeyName, blob: &[u8]) -> Result<Vec<u8>, Failure> {
        let transport = self.transport()?;
        self.rewrap_under(kind, wrapping_key, transport, blob)
    }

    /// From one key to another; the keys are in clear inside the HSM alone.
    pub(super) fn move_keys(
        &mut self,
        from: &KeyName,
        to: &KeyName,
        blobs: &[(KeyKind, Vec<u8>)],
    ) -> Result<Vec<Vec<u8>>, Failure> {
        let target = self.key(to)?;
        blobs.iter().map(|(kind, blob)| self.rewrap_under(*kind, from, target, blob)).collect()
    }

    fn rewrap_under(
        &mut self,
        kind: KeyKind,
        from: &KeyName,
        to: ObjectHandle,
        blob: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let keeping = self.key(from)?;
        let mut template = if self.shared.module.unwrappable.contains(&kind) {
            secret_template(KeyType::GENERIC_SECRET)
        } else {
            let key_type = match kind {
                KeyKind::P256 | KeyKind::P384 => KeyType::EC,
                KeyKind::Ed25519 => KeyType::EC_EDWARDS,
                KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => KeyType::RSA,
            };
            let mut template = secret_template(key_type);
            template[0] = Attribute::Class(ObjectClass::PRIVATE_KEY);
            template
        };
        if self.shared.module.unwraps_extractable {
            template.retain(|attribute| *attribute != Attribute::Extractable(true));
        }
        let object = self.unwrap_under(keeping, blob, &template, || format!("unwrapping a {kind} key under {from}"))?;
        let rewrapped = self.wrap_under(to, object);
        self.forget(object)?;
        rewrapped
    }

    pub(super) fn public_key(&self, kind: KeyKind, object: ObjectHandle) -> Result<WirePublicKey, Failure> {
        let doing = || "reading a new public key".to_owned();
        let missing = || Failure::new(FailureClass::Rejected, "the module does not show a new public key");
        if kind.rsa_bits().is_some() {
            let wanted = [AttributeType::Modulus, AttributeType::PublicExponent];
            let found = self.session.get_attributes(object, &wanted).doing(doing)?;
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
        let found = self.session.get_attributes(object, &[AttributeType::EcPoint]).doing(doing)?;
        let Some(Attribute::EcPoint(point)) = found.into_iter().next() else { return Err(missing()) };
        let point = raw_point(point);
        Ok(if kind == KeyKind::Ed25519 { WirePublicKey::Ed25519(point) } else { WirePublicKey::Ec(point) })
    }

    /// Makes a token object with a template; the caller has checked that its names are free.
    pub(crate) fn create_token_pair(
        &self,
        kind: KeyKind,
        public_template: &[Attribute],
        private_template: &[Attribute],
    ) -> Result<WirePublicKey, Failure> {
        let (mechanism, mut public) = pair_generation(kind);
        public.extend_from_slice(public_template);
        let (object, _) = self
            .session
            .generate_key_pair(&mechanism, &public, private_template)
            .doing(|| format!("generating a {kind} pair on the token"))?;
        self.public_key(kind, object)
    }
}

/// A session object's template for a secret that is only passing through.
fn secret_template(key_type: KeyType) -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(key_type),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(true),
    ]
}

/// CKA_EC_POINT is a DER OCTET STRING (PKCS#11 v2.40 §2.3.3); some modules give the point itself.
fn raw_point(point: Vec<u8>) -> Vec<u8> {
    use der::Decode as _;
    match <&der::asn1::OctetStringRef>::from_der(&point) {
        Ok(inner) => inner.as_bytes().to_vec(),
        Err(_) => point,
    }
}
