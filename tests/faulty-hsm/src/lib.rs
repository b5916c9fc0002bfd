//! A PKCS#11 module for tests: forwards every call to a real module (`FAULTY_HSM_MODULE`) and injects the faults that the control
//! file (`FAULTY_HSM_CONTROL`) currently lists. `control` documents the file format.
#![allow(non_snake_case, reason = "the functions have the names of the standard")]
#![allow(unsafe_op_in_unsafe_fn, reason = "each function is a C call that forwards its arguments")]

mod control;
mod return_codes;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use control::{Action, Control};
use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BBOOL, CK_BYTE, CK_FLAGS, CK_FUNCTION_LIST, CK_INFO, CK_MECHANISM, CK_MECHANISM_INFO,
    CK_MECHANISM_TYPE, CK_NOTIFY, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SESSION_INFO, CK_SLOT_ID,
    CK_SLOT_INFO, CK_TOKEN_INFO, CK_ULONG, CK_USER_TYPE, CKF_PROTECTED_AUTHENTICATION_PATH, CKF_SERIAL_SESSION,
    CKR_ARGUMENTS_BAD, CKR_DEVICE_REMOVED, CKR_FUNCTION_CANCELED, CKR_GENERAL_ERROR, CKR_OK,
};

struct Module {
    /// Never unloaded.
    _library: cryptoki_sys::Pkcs11,
    real: CK_FUNCTION_LIST,
    faulty: CK_FUNCTION_LIST,
}

// SAFETY: the function pointers never change, and the module's functions may be called by any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

static MODULE: OnceLock<Option<Module>> = OnceLock::new();
static CONTROL: Mutex<Option<Control>> = Mutex::new(None);
/// The time of each session's last use.
static USED: Mutex<BTreeMap<CK_SESSION_HANDLE, Instant>> = Mutex::new(BTreeMap::new());

fn path_variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).map(PathBuf::from);
    if value.is_none() {
        eprintln!("faulty-hsm: environment variable {name} is not set");
    }
    value
}

fn load() -> Option<Module> {
    let path = path_variable("FAULTY_HSM_MODULE")?;
    *CONTROL.lock().unwrap_or_else(PoisonError::into_inner) = Some(Control::new(path_variable("FAULTY_HSM_CONTROL")?));
    // SAFETY: the test has named the real module, which any program may load.
    let library = unsafe { cryptoki_sys::Pkcs11::new(path) }.ok()?;
    let mut list: *mut CK_FUNCTION_LIST = std::ptr::null_mut();
    // SAFETY: as the standard requires, the argument is a pointer to a pointer that the module sets.
    let real = unsafe {
        if library.C_GetFunctionList(&raw mut list) != CKR_OK || list.is_null() {
            return None;
        }
        *list
    };
    Some(Module { _library: library, real, faulty: faulty(real) })
}

fn module() -> Option<&'static Module> {
    MODULE.get_or_init(load).as_ref()
}

/// The one symbol that a PKCS#11 v2.40 module needs.
///
/// # Safety
/// `list` is null, or points to memory for the pointer to the function list.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    match module() {
        Some(module) if !list.is_null() => {
            *list = (&raw const module.faulty).cast_mut();
            CKR_OK
        }
        _ => CKR_GENERAL_ERROR,
    }
}

/// How a function continues after the control file was consulted.
enum Next {
    Forward,
    Return(CK_RV),
    ForwardWith(Action),
}

fn before(function: &str) -> Next {
    let action = {
        let mut control = CONTROL.lock().unwrap_or_else(PoisonError::into_inner);
        control.as_mut().and_then(|control| control.next_action(function))
    };
    match action {
        None => Next::Forward,
        Some(Action::Return(code)) => Next::Return(code),
        Some(Action::Sleep(time)) => {
            std::thread::sleep(time);
            Next::Forward
        }
        Some(Action::Hang) => loop {
            std::thread::park();
        },
        Some(Action::Crash) => std::process::abort(),
        Some(Action::DropSessions) => {
            for_each_slot(|real, slot| {
                if let Some(close) = real.C_CloseAllSessions {
                    // SAFETY: the module itself has listed the slot.
                    unsafe { close(slot) };
                }
            });
            Next::Forward
        }
        Some(Action::Logout) => {
            for_each_slot(log_out);
            Next::Forward
        }
        Some(Action::TokenRemoved) if matches!(function, "C_Initialize" | "C_Finalize" | "C_GetInfo") => Next::Forward,
        Some(Action::TokenRemoved) if function == "C_GetSlotList" => Next::ForwardWith(Action::TokenRemoved),
        Some(Action::TokenRemoved) => Next::Return(CKR_DEVICE_REMOVED),
        Some(action @ (Action::Flip | Action::Short | Action::Keypad | Action::Idle(_))) => Next::ForwardWith(action),
    }
}

/// Closes the sessions that were idle for longer than the limit, and records the use of this session.
fn end_idle_sessions(session: u64, limit: Duration) {
    let mut used = USED.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(close) = module().and_then(|module| module.real.C_CloseSession) else { return };
    used.retain(|session, last| {
        let is_idle = last.elapsed() > limit;
        if is_idle {
            // SAFETY: the handle is a session of this module, or the module refuses it.
            unsafe { close(*session) };
        }
        !is_idle
    });
    used.entry(session).and_modify(|last| *last = Instant::now());
}

fn session_opened(session: CK_SESSION_HANDLE) {
    USED.lock().unwrap_or_else(PoisonError::into_inner).insert(session, Instant::now());
}

fn for_each_slot(visit: impl Fn(&CK_FUNCTION_LIST, CK_SLOT_ID)) {
    let Some(module) = module() else { return };
    let Some(list) = module.real.C_GetSlotList else { return };
    let mut slots: [CK_SLOT_ID; 64] = [0; 64];
    let mut count: CK_ULONG = 64;
    // SAFETY: `count` is the length of the array.
    if unsafe { list(1, slots.as_mut_ptr(), &raw mut count) } == CKR_OK {
        slots.iter().take(count as usize).for_each(|slot| visit(&module.real, *slot));
    }
}

/// Logs out through a new session. A login applies to the token, so this logs out all sessions.
fn log_out(real: &CK_FUNCTION_LIST, slot: CK_SLOT_ID) {
    let (Some(open), Some(logout), Some(close)) = (real.C_OpenSession, real.C_Logout, real.C_CloseSession) else {
        return;
    };
    let mut session: CK_SESSION_HANDLE = 0;
    // SAFETY: the module itself has listed the slot and opened the session.
    unsafe {
        if open(slot, CKF_SERIAL_SESSION, std::ptr::null_mut(), None, &raw mut session) == CKR_OK {
            logout(session);
            close(session);
        }
    }
}

/// C_Login. With a keypad it takes the PIN from the file `FAULTY_HSM_KEYPAD`, which stands for a person, and none from the
/// program.
unsafe extern "C" fn login(session: CK_SESSION_HANDLE, user: CK_USER_TYPE, pin: *mut CK_BYTE, len: CK_ULONG) -> CK_RV {
    let Some(real) = module().and_then(|module| module.real.C_Login) else { return CKR_GENERAL_ERROR };
    match before("C_Login") {
        Next::Return(code) => code,
        Next::ForwardWith(Action::Keypad) if !pin.is_null() => CKR_ARGUMENTS_BAD,
        Next::ForwardWith(Action::Keypad) => {
            match path_variable("FAULTY_HSM_KEYPAD").and_then(|path| std::fs::read(path).ok()) {
                Some(mut typed) => real(session, user, typed.as_mut_ptr(), typed.len() as CK_ULONG),
                None => CKR_FUNCTION_CANCELED,
            }
        }
        Next::Forward | Next::ForwardWith(_) => real(session, user, pin, len),
    }
}

/// Modifies the output of a call.
///
/// # Safety
/// `bytes` is null or points to `*len` bytes, as set by the module.
unsafe fn corrupt(action: &Action, bytes: *mut CK_BYTE, len: *mut CK_ULONG) {
    if len.is_null() || *len == 0 {
        return;
    }
    match action {
        Action::Flip if !bytes.is_null() => *bytes.add(*len as usize / 2) ^= 1,
        // If the caller queries the length only, the length is one byte too short.
        Action::Short => *len -= 1,
        _ => {}
    }
}

/// The name and the value of a function's first argument.
macro_rules! first {
    ($first:ident $(, $rest:ident)*) => {
        (stringify!($first), $first as usize as u64)
    };
}

/// Defines functions that forward to the real ones. `after` runs on a successful answer, with the action to apply.
macro_rules! functions {
    ($($name:ident($($arg:ident: $type:ty),*) $(after($action:ident) $after:block)?;)*) => {
        $(
            unsafe extern "C" fn $name($($arg: $type),*) -> CK_RV {
                let next = before(stringify!($name));
                if let (Next::ForwardWith(Action::Idle(limit)), ("session", session)) = (&next, first!($($arg),*)) {
                    end_idle_sessions(session, *limit);
                }
                if let Next::Return(code) = next {
                    return code;
                }
                let Some(real) = module().and_then(|module| module.real.$name) else { return CKR_GENERAL_ERROR };
                let answer = real($($arg),*);
                $(if let (CKR_OK, Next::ForwardWith($action)) = (answer, &next) $after)?
                answer
            }
        )*

        fn faulty(mut list: CK_FUNCTION_LIST) -> CK_FUNCTION_LIST {
            $(list.$name = Some($name);)*
            list.C_Login = Some(login);
            list.C_GetFunctionList = Some(C_GetFunctionList);
            list
        }
    };
}

functions! {
    C_Initialize(arguments: *mut c_void);
    C_Finalize(reserved: *mut c_void);
    C_GetInfo(info: *mut CK_INFO);
    C_GetSlotList(present: CK_BBOOL, slots: *mut CK_SLOT_ID, count: *mut CK_ULONG) after(action) {
        if matches!(action, Action::TokenRemoved) && !count.is_null() {
            *count = 0;
        }
    };
    C_GetSlotInfo(slot: CK_SLOT_ID, info: *mut CK_SLOT_INFO);
    C_GetTokenInfo(slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO) after(action) {
        if matches!(action, Action::Keypad) && !info.is_null() {
            (*info).flags |= CKF_PROTECTED_AUTHENTICATION_PATH;
        }
    };
    C_GetMechanismList(slot: CK_SLOT_ID, list: *mut CK_MECHANISM_TYPE, count: *mut CK_ULONG);
    C_GetMechanismInfo(slot: CK_SLOT_ID, mechanism: CK_MECHANISM_TYPE, info: *mut CK_MECHANISM_INFO);
    C_OpenSession(
        slot: CK_SLOT_ID,
        flags: CK_FLAGS,
        application: *mut c_void,
        notify: CK_NOTIFY,
        session: *mut CK_SESSION_HANDLE
    ) after(action) {
        if matches!(action, Action::Idle(_)) && !session.is_null() {
            session_opened(*session);
        }
    };
    C_CloseSession(session: CK_SESSION_HANDLE);
    C_GetSessionInfo(session: CK_SESSION_HANDLE, info: *mut CK_SESSION_INFO);
    C_CreateObject(
        session: CK_SESSION_HANDLE,
        template: *mut CK_ATTRIBUTE,
        count: CK_ULONG,
        object: *mut CK_OBJECT_HANDLE
    );
    C_CopyObject(
        session: CK_SESSION_HANDLE,
        object: CK_OBJECT_HANDLE,
        template: *mut CK_ATTRIBUTE,
        count: CK_ULONG,
        copy: *mut CK_OBJECT_HANDLE
    );
    C_DestroyObject(session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE);
    C_GetAttributeValue(
        session: CK_SESSION_HANDLE,
        object: CK_OBJECT_HANDLE,
        template: *mut CK_ATTRIBUTE,
        count: CK_ULONG
    ) after(action) {
        // Only the first attribute, which is the public key when a new pair is read.
        if count > 0 && !template.is_null() {
            corrupt(action, (*template).pValue.cast(), &raw mut (*template).ulValueLen);
        }
    };
    C_FindObjectsInit(session: CK_SESSION_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG);
    C_FindObjects(
        session: CK_SESSION_HANDLE,
        objects: *mut CK_OBJECT_HANDLE,
        most: CK_ULONG,
        count: *mut CK_ULONG
    );
    C_FindObjectsFinal(session: CK_SESSION_HANDLE);
    C_SignInit(session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, key: CK_OBJECT_HANDLE);
    C_Sign(
        session: CK_SESSION_HANDLE,
        data: *mut CK_BYTE,
        data_len: CK_ULONG,
        signature: *mut CK_BYTE,
        len: *mut CK_ULONG
    ) after(action) { corrupt(action, signature, len); };
    C_GenerateKey(
        session: CK_SESSION_HANDLE,
        mechanism: *mut CK_MECHANISM,
        template: *mut CK_ATTRIBUTE,
        count: CK_ULONG,
        key: *mut CK_OBJECT_HANDLE
    );
    C_GenerateKeyPair(
        session: CK_SESSION_HANDLE,
        mechanism: *mut CK_MECHANISM,
        public: *mut CK_ATTRIBUTE,
        public_count: CK_ULONG,
        private: *mut CK_ATTRIBUTE,
        private_count: CK_ULONG,
        public_key: *mut CK_OBJECT_HANDLE,
        private_key: *mut CK_OBJECT_HANDLE
    );
    C_WrapKey(
        session: CK_SESSION_HANDLE,
        mechanism: *mut CK_MECHANISM,
        wrapping: CK_OBJECT_HANDLE,
        key: CK_OBJECT_HANDLE,
        wrapped: *mut CK_BYTE,
        len: *mut CK_ULONG
    ) after(action) { corrupt(action, wrapped, len); };
    C_UnwrapKey(
        session: CK_SESSION_HANDLE,
        mechanism: *mut CK_MECHANISM,
        unwrapping: CK_OBJECT_HANDLE,
        wrapped: *mut CK_BYTE,
        len: CK_ULONG,
        template: *mut CK_ATTRIBUTE,
        count: CK_ULONG,
        key: *mut CK_OBJECT_HANDLE
    );
    C_DeriveKey(
        session: CK_SESSION_HANDLE,
        mechanism: *mut CK_MECHANISM,
        base: CK_OBJECT_HANDLE,
        template: *mut CK_ATTRIBUTE,
        count: CK_ULONG,
        key: *mut CK_OBJECT_HANDLE
    );
    C_GenerateRandom(session: CK_SESSION_HANDLE, bytes: *mut CK_BYTE, len: CK_ULONG);
}
