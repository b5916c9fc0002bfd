//! Access control data on sled, in the database of the state store.
//!
//! | key | value |
//! |---|---|
//! | `Ar` + request | request |
//! | `Al` | rules |
//! | `Aq` + station | quota |
//! | `Au` + station | devices begun |
//! | `Av` + caller | revocation |
//! | `Ac` + caller | newest certificate |
//! | `Ag` + number, 8 bytes | identity range |
//! | `Aa` + chip ID in hex, `/`, profile | identity allocated to the chip |

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;
use spp_format::approval::{ApprovalRules, ProtectedAction, Quota, RequestId, SignedStatement, Verdict};
use spp_format::certificate::{Caller, parse_caller_certificate};
use spp_format::names::{ChipId, DeviceIdentity, OfficerName, ProfileName, StationName};

use super::session_rows::{identity_key, session_by_index};
use super::state_store::SledStateStore;
use super::view::View;
use crate::access::{
    AccessError, AccessReader, AccessStore, AppliedQuota, AppliedRules, ApprovalRequest, IdentityRange, IssuedAccess,
    LoadedRange, MAX_OPEN_REQUESTS, MAX_OWN_REQUESTS, MAX_RANGES, MAX_REQUESTS, Refused, RequestError, RequestState,
    Revocation, StationUse, Usage,
};
use crate::store::{ReserveError, Session, StoreError};

/// Maximum used identities that one call skips. The position is stored, so that the next call continues there.
const MAX_SKIPPED: usize = 1000;

#[async_trait]
impl AccessStore for SledStateStore {
    async fn apply(
        &self,
        rules: ApprovalRules,
        quotas: Vec<(StationName, Quota)>,
        all_or_nothing: bool,
    ) -> Result<Vec<String>, StoreError> {
        self.0.run("applying rules and quotas", move |view| apply(view, rules, quotas, all_or_nothing)).await
    }

    async fn file_request(&self, request: ApprovalRequest) -> Result<ApprovalRequest, AccessError> {
        self.0.run("filing a request", move |view| file_request(view, request)).await
    }

    async fn decide(
        &self,
        id: RequestId,
        verdict: Verdict,
        by: SignedStatement,
    ) -> Result<ApprovalRequest, AccessError> {
        self.0.run("deciding a request", move |view| decide(view, id, verdict, by)).await
    }

    async fn consume_approval(&self, id: RequestId, at: u64) -> Result<ApprovalRequest, AccessError> {
        let consume_approval = move |view: &mut View<'_>| {
            let known = with_current_rules(view, request(view, id)?.ok_or(RequestError::Unknown(id))?)?;
            let consumed = known.consume_approval(at)?;
            put_request(view, &consumed)?;
            Ok(consumed)
        };
        self.0.run("consuming an approval", consume_approval).await
    }

    async fn record_certificate(&self, certificate: &IssuedAccess) -> Result<(), StoreError> {
        let certificate = certificate.clone();
        let key = caller_key(b"Ac", &certificate.caller);
        self.0.run("storing a certificate", move |view| view.put(&key, &certificate)).await
    }

    async fn load_range(
        &self,
        profile: ProfileName,
        range: IdentityRange,
        by: &Caller,
        at: u64,
    ) -> Result<LoadedRange, AccessError> {
        let by = by.to_string();
        self.0.run("loading identities", move |view| load_range(view, profile, range, by, at)).await
    }

    async fn allocate(
        &self,
        chip: &ChipId,
        profile: &ProfileName,
        station: &StationName,
        permitted: Vec<String>,
        taken: Option<DeviceIdentity>,
        at: u64,
    ) -> Result<DeviceIdentity, AccessError> {
        let (chip, profile, station) = (chip.clone(), profile.clone(), station.clone());
        let allocated = self.0.run("allocating an identity", move |view| {
            if let Some(identity) = allocated_before(view, &chip, &profile, taken.as_ref())? {
                return Ok::<_, AccessError>(Ok(identity));
            }
            check_quota(view, &station, at)?;
            // A refusal is not a transaction error, because the number of skipped identities must be stored.
            let allocated = allocate(view, &chip, &profile, &permitted)?;
            Ok(allocated.and_then(|found| found.ok_or(Refused::NoIdentity { profile, station })))
        });
        Ok(allocated.await??)
    }
}

#[async_trait]
impl AccessReader for SledStateStore {
    async fn rules(&self) -> Result<Option<AppliedRules>, StoreError> {
        self.0.run("reading the rules", |view| view.get(RULES, || "the rules".into())).await
    }

    async fn stations(&self) -> Result<Vec<StationUse>, StoreError> {
        self.0.run("reading the quotas", |view| stations(view)).await
    }

    async fn requests(&self) -> Result<Vec<ApprovalRequest>, StoreError> {
        self.0.run("listing requests", |view| requests(view)).await
    }

    async fn request(&self, id: RequestId) -> Result<Option<ApprovalRequest>, StoreError> {
        self.0.run("reading a request", move |view| request(view, id)).await
    }

    async fn revocations(&self) -> Result<Vec<Revocation>, StoreError> {
        self.0.run("listing revocations", |view| values(view, b"Av")).await
    }

    async fn certificates(&self) -> Result<Vec<IssuedAccess>, StoreError> {
        self.0.run("listing certificates", |view| values(view, b"Ac")).await
    }

    async fn ranges(&self) -> Result<Vec<LoadedRange>, StoreError> {
        self.0.run("listing identity ranges", |view| values(view, b"Ag")).await
    }
}

fn apply(
    view: &mut View<'_>,
    rules: ApprovalRules,
    quotas: Vec<(StationName, Quota)>,
    all_or_nothing: bool,
) -> Result<Vec<String>, StoreError> {
    let mut refused = Vec::new();
    let known: Option<AppliedRules> = view.get(RULES, || "the rules".into())?;
    let rules = AppliedRules::apply(known, rules);
    if rules.is_err() {
        let refusal = "approvals: changing the rules in force needs the approval of another officer (sppctl approvals request \
                       rules)";
        refused.push(refusal.to_owned());
    }
    let mut applied = Vec::new();
    for (station, configured) in quotas {
        match AppliedQuota::apply(quota(view, &station)?, configured) {
            Ok(quota) => applied.push((station, quota)),
            Err(_) => refused.push(format!(
                "station {station}: raising its quota in force needs the approval of another officer (sppctl approvals request \
                 quota {station})"
            )),
        }
    }
    if all_or_nothing && !refused.is_empty() {
        return Ok(refused);
    }
    if let Ok(rules) = rules
        && known != Some(rules)
    {
        view.put(RULES, &rules)?;
    }
    for (station, quota_in_force) in applied {
        if quota(view, &station)? != Some(quota_in_force) {
            view.put(&station_key(b"Aq", &station), &quota_in_force)?;
        }
    }
    Ok(refused)
}

fn quota(view: &View<'_>, station: &StationName) -> Result<Option<AppliedQuota>, StoreError> {
    view.get(&station_key(b"Aq", station), || format!("the quota of {station}"))
}

fn usage(view: &View<'_>, station: &StationName) -> Result<Usage, StoreError> {
    let usage = view.get(&station_key(b"Au", station), || format!("the usage of station {station}"))?;
    Ok(usage.unwrap_or_default())
}

fn stations(view: &View<'_>) -> Result<Vec<StationUse>, StoreError> {
    let mut stations = Vec::new();
    for key in view.keys(b"Aq")? {
        let name = std::str::from_utf8(&key[2..]).ok().and_then(|name| name.parse::<StationName>().ok());
        let station = name.ok_or_else(|| view.damaged("a station name".into(), "invalid"))?;
        let quota = quota(view, &station)?.ok_or_else(|| view.damaged(format!("the quota of {station}"), "missing"))?;
        let usage = usage(view, &station)?;
        stations.push(StationUse { station, quota, usage });
    }
    Ok(stations)
}

/// Counts a new device against the station's quota. Runs in the transaction that reserves the device, so that the count
/// cannot exceed the quota or include devices that were not begun. A station without a stored quota is unlimited.
pub(super) fn count_device(view: &mut View<'_>, session: &Session) -> Result<(), ReserveError> {
    let Some(applied) = quota(view, &session.station)? else { return Ok(()) };
    let mut usage = usage(view, &session.station)?;
    let exceeded = usage.begin(&applied.in_force, session.created);
    exceeded.map_err(|exceeded| ReserveError::QuotaExceeded { station: session.station.clone(), exceeded })?;
    Ok(view.put(&station_key(b"Au", &session.station), &usage)?)
}

fn file_request(view: &mut View<'_>, new: ApprovalRequest) -> Result<ApprovalRequest, AccessError> {
    if let Some(known) = request(view, new.id)? {
        let same = known.action == new.action
            && known.requested.officer == new.requested.officer
            && known.requested.statement == new.requested.statement;
        return if same { Ok(known) } else { Err(RequestError::Taken(new.id).into()) };
    }
    check_not_revoked(view, &new.requested)?;
    let known = requests(view)?;
    let now = new.requested.at;
    let is_open = |request: &&ApprovalRequest| matches!(request.effective_state(now), "pending" | "approved");
    let open = known.iter().filter(is_open).count();
    let own = known.iter().filter(is_open).filter(|known| known.requested.officer == new.requested.officer).count();
    // The limits prevent one officer from blocking others. Half of the capacity is reserved for revocations.
    let limit =
        if matches!(new.action, ProtectedAction::Revoke { .. }) { MAX_OPEN_REQUESTS } else { MAX_OPEN_REQUESTS / 2 };
    if own >= MAX_OWN_REQUESTS || open >= limit {
        return Err(RequestError::TooMany(open).into());
    }
    let decided = known.iter().filter(|request| !is_open(request));
    for old in decided.skip(MAX_REQUESTS - MAX_OPEN_REQUESTS) {
        view.remove(&request_key(old.id))?;
    }
    put_request(view, &new)?;
    Ok(new)
}

fn decide(
    view: &mut View<'_>,
    id: RequestId,
    verdict: Verdict,
    by: SignedStatement,
) -> Result<ApprovalRequest, AccessError> {
    check_not_revoked(view, &by)?;
    let known = with_current_rules(view, request(view, id)?.ok_or(RequestError::Unknown(id))?)?;
    let before = known.state.clone();
    let (at, decided) = (
        by.at,
        match verdict {
            Verdict::Approve => known.approve(by)?,
            Verdict::Reject(reason) => known.reject(by, reason)?,
        },
    );
    put_request(view, &decided)?;
    if matches!(decided.state, RequestState::Done(_)) && before != decided.state {
        execute(view, &decided, at)?;
    }
    Ok(decided)
}

/// Raises the number of required approvals if the rules have become stricter since the request.
fn with_current_rules(view: &View<'_>, mut known: ApprovalRequest) -> Result<ApprovalRequest, StoreError> {
    if let Some(rules) = view.get::<AppliedRules>(RULES, || "the rules".into())? {
        known.needed = known.needed.max(rules.in_force.needed(known.action.kind()));
    }
    Ok(known)
}

/// Checks for revocations between the start of the call and this transaction.
fn check_not_revoked(view: &View<'_>, by: &SignedStatement) -> Result<(), AccessError> {
    let key = caller_key(b"Av", &Caller::Officer(by.officer.clone()));
    let revoked: Option<Revocation> = view.get(&key, || format!("the revocation of {}", by.officer))?;
    let not_before = parse_caller_certificate(&by.certificate).map_or(0, |certificate| certificate.not_before);
    match revoked {
        Some(revoked) if not_before <= revoked.at => Err(RequestError::Revoked(by.officer.clone()).into()),
        _ => Ok(()),
    }
}

fn execute(view: &mut View<'_>, request: &ApprovalRequest, at: u64) -> Result<(), AccessError> {
    match &request.action {
        ProtectedAction::Revoke { role, name, reason } => {
            let caller = Caller::new(*role, name).map_err(|e| Refused::Unfit(e.to_string()))?;
            // Covers every certificate issued so far, even if a clock was wrong when one of them was issued.
            let newest: Option<IssuedAccess> = view.get(&caller_key(b"Ac", &caller), || format!("{caller}"))?;
            let before: Option<Revocation> = view.get(&caller_key(b"Av", &caller), || format!("{caller}"))?;
            let at = at.max(newest.map_or(0, |newest| newest.not_before)).max(before.map_or(0, |before| before.at));
            let revocation = Revocation { caller, at, reason: reason.clone(), request: request.id };
            view.put(&caller_key(b"Av", &revocation.caller), &revocation)?;
            if let Caller::Officer(officer) = &revocation.caller {
                void_signatures_of(view, officer)?;
            }
            Ok(())
        }
        ProtectedAction::RaiseQuota { station, quota: approved } => {
            let known = quota(view, station)?;
            let configured = known.map_or(*approved, |known| known.configured);
            Ok(view.put(&station_key(b"Aq", station), &AppliedQuota { configured, in_force: *approved })?)
        }
        ProtectedAction::ChangeRules { rules } => {
            let known: Option<AppliedRules> = view.get(RULES, || "the rules".into())?;
            let configured = known.map_or(*rules, |known| known.configured);
            Ok(view.put(RULES, &AppliedRules { configured, in_force: *rules })?)
        }
        ProtectedAction::Ceremony { .. } | ProtectedAction::Enroll { .. } => Ok(()),
    }
}

fn void_signatures_of(view: &mut View<'_>, officer: &OfficerName) -> Result<(), StoreError> {
    for request in requests(view)? {
        let without = request.clone().without_signatures_of(officer);
        if without != request {
            put_request(view, &without)?;
        }
    }
    Ok(())
}

/// Newest first.
fn requests(view: &View<'_>) -> Result<Vec<ApprovalRequest>, StoreError> {
    let mut found = Vec::new();
    for key in view.keys(b"Ar")? {
        let bytes = key.get(2..).and_then(|id| id.try_into().ok());
        let id = RequestId::from_bytes(bytes.ok_or_else(|| view.damaged("a request".into(), "invalid ID"))?);
        found.extend(request(view, id)?);
    }
    found.sort_by_key(|request| std::cmp::Reverse((request.requested.at, request.id)));
    Ok(found)
}

fn request(view: &View<'_>, id: RequestId) -> Result<Option<ApprovalRequest>, StoreError> {
    view.get(&request_key(id), || format!("request {id}"))
}

fn put_request(view: &mut View<'_>, request: &ApprovalRequest) -> Result<(), StoreError> {
    view.put(&request_key(request.id), request)
}

fn load_range(
    view: &mut View<'_>,
    profile: ProfileName,
    range: IdentityRange,
    by: String,
    at: u64,
) -> Result<LoadedRange, AccessError> {
    let known: Vec<LoadedRange> = values(view, b"Ag")?;
    if let Some(same) = known.iter().find(|known| known.range == range && known.profile == profile) {
        return Ok(same.clone());
    }
    if let Some(other) = known.iter().find(|known| known.range.overlaps(&range)) {
        let (first, last) = (Box::new(other.range.first().clone()), Box::new(other.range.last()));
        return Err(Refused::Overlaps { number: other.number, first, last }.into());
    }
    if known.len() >= MAX_RANGES {
        return Err(Refused::Unfit(format!("{MAX_RANGES} ranges are loaded, the maximum")).into());
    }
    let number = known.last().map_or(1, |last| last.number + 1);
    let loaded = LoadedRange { number, profile, range, used: 0, by, at };
    view.put(&range_key(number), &loaded)?;
    Ok(loaded)
}

/// The identity that was allocated to the chip earlier, if it is still free for it.
fn allocated_before(
    view: &View<'_>,
    chip: &ChipId,
    profile: &ProfileName,
    taken: Option<&DeviceIdentity>,
) -> Result<Option<DeviceIdentity>, StoreError> {
    let allocated: Option<DeviceIdentity> =
        view.get(&allocation_key(chip, profile), || format!("the identity of {chip}"))?;
    let Some(identity) = allocated.filter(|identity| taken != Some(identity)) else { return Ok(None) };
    // A station may since have used the identity explicitly for another chip.
    let holder = session_by_index(view, &identity_key(&identity))?;
    Ok(Some(identity).filter(|_| holder.is_none_or(|holder| holder.chip == *chip)))
}

/// Checks the quota before an allocation, so that devices that cannot be begun use up no identities.
fn check_quota(view: &View<'_>, station: &StationName, at: u64) -> Result<(), AccessError> {
    let Some(applied) = quota(view, station)? else { return Ok(()) };
    let checked = usage(view, station)?.check_quota(&applied.in_force, at);
    Ok(checked.map_err(|exceeded| Refused::Quota { station: station.clone(), exceeded })?)
}

fn allocate(
    view: &mut View<'_>,
    chip: &ChipId,
    profile: &ProfileName,
    permitted: &[String],
) -> Result<Result<Option<DeviceIdentity>, Refused>, StoreError> {
    let mut skipped = 0;
    for mut loaded in values::<LoadedRange>(view, b"Ag")?.into_iter().filter(|loaded| loaded.profile == *profile) {
        let before = loaded.used;
        let mut found = None;
        while let Some(identity) = loaded.range.nth(loaded.used) {
            if skipped > MAX_SKIPPED || !permitted.iter().any(|prefix| identity.to_string().starts_with(prefix)) {
                break;
            }
            loaded.used += 1;
            if view.get_bytes(&identity_key(&identity))?.is_none() {
                found = Some(identity);
                break;
            }
            skipped += 1;
        }
        if loaded.used != before {
            view.put(&range_key(loaded.number), &loaded)?;
        }
        if let Some(identity) = found {
            view.put(&allocation_key(chip, profile), &identity)?;
            return Ok(Ok(Some(identity)));
        }
        if skipped > MAX_SKIPPED {
            return Ok(Err(Refused::TooManyInUse(MAX_SKIPPED)));
        }
    }
    Ok(Ok(None))
}

/// All values whose keys have a prefix.
fn values<T: DeserializeOwned + Serialize>(view: &View<'_>, prefix: &[u8]) -> Result<Vec<T>, StoreError> {
    let values = view.keys(prefix)?.into_iter().map(|key| {
        let name = || format!("entry {}", hex::encode(&key));
        view.get(&key, name)?.ok_or_else(|| view.damaged(name(), "missing"))
    });
    values.collect()
}

const RULES: &[u8] = b"Al";

fn request_key(id: RequestId) -> Vec<u8> {
    [b"Ar", id.as_bytes().as_slice()].concat()
}

fn station_key(prefix: &[u8], station: &StationName) -> Vec<u8> {
    [prefix, station.as_str().as_bytes()].concat()
}

fn caller_key(prefix: &[u8], caller: &Caller) -> Vec<u8> {
    [prefix, caller.role().as_str().as_bytes(), b"/", caller.name().as_bytes()].concat()
}

fn range_key(number: u64) -> Vec<u8> {
    [b"Ag", number.to_be_bytes().as_slice()].concat()
}

fn allocation_key(chip: &ChipId, profile: &ProfileName) -> Vec<u8> {
    // The separator ends the chip ID, whose length varies. Profile names cannot contain it.
    [b"Aa", hex::encode(chip.as_bytes()).as_bytes(), b"/", profile.as_str().as_bytes()].concat()
}
