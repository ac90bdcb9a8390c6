//! Volumes that shall grow. The template of the StatefulSet can't change, so each claim is patched.

use std::sync::Arc;

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams};
use millrace_crds::conditions::Reason;
use serde_json::json;

use crate::context::{Context, MANAGER};
use crate::error::{Doing, Error};
use crate::problem::Problem;

/// What there is to grow.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Growth {
    /// The claims that ask for less than they shall.
    pub(super) patch: Vec<String>,
    /// The claims that ask for it and have not got it yet.
    pub(super) growing: usize,
    /// Why it can't be.
    pub(super) problem: Option<Problem>,
}

/// Compares claims with the size that is wanted. One that is larger, as others may have made it, is left.
pub(super) fn growth(
    claims: &[Arc<PersistentVolumeClaim>],
    classes: &[Arc<StorageClass>],
    size: &Quantity,
) -> Growth {
    let mut growth = Growth::default();
    let Some(wanted) = bytes(size) else {
        return growth;
    };
    for claim in claims {
        let name = claim.name_any();
        let spec = claim.spec.as_ref();
        let requested = spec
            .and_then(|spec| spec.resources.as_ref()?.requests.as_ref()?.get("storage"))
            .and_then(bytes);
        let capacity = claim.status.as_ref();
        let capacity = capacity
            .and_then(|status| status.capacity.as_ref()?.get("storage"))
            .and_then(bytes);
        // A claim that has no volume yet can't be changed.
        let (Some(requested), Some(capacity)) = (requested, capacity) else {
            continue;
        };
        if requested >= wanted {
            growth.growing += usize::from(capacity < wanted);
            continue;
        }
        let class = spec.and_then(|spec| spec.storage_class_name.as_deref());
        let class = class.unwrap_or_default();
        let found = classes.iter().find(|other| other.name_any() == class);
        if found.and_then(|class| class.allow_volume_expansion) == Some(true) {
            growth.patch.push(name);
            growth.growing += 1;
        } else {
            let message = format!(
                "{name} can't grow to {}: its storage class {class:?} does not allow volumes to grow. Set allowVolumeExpansion on the class if \
                 its driver can, or move to a new Cluster",
                size.0
            );
            growth.problem = Some(Problem::stalled(Reason::StorageNotExpandable, message));
        }
    }
    growth
}

pub(super) async fn grow(
    context: &Context,
    namespace: &str,
    name: &str,
    size: &Quantity,
) -> Result<(), Error> {
    let api = context.api::<PersistentVolumeClaim>(namespace);
    let patch = json!({"spec": {"resources": {"requests": {"storage": size}}}});
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    api.patch(name, &params, &Patch::Merge(&patch))
        .await
        .doing(|| format!("grow PersistentVolumeClaim {namespace}/{name}"))?;
    Ok(())
}

/// An amount in Kubernetes' notation as whole bytes.
fn bytes(quantity: &Quantity) -> Option<u128> {
    let text = quantity.0.as_str();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let factor: u128 = match unit {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "E" => 1_000_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "Ei" => 1 << 60,
        exponent => {
            let exponent = exponent.strip_prefix(['e', 'E'])?;
            10_u128.checked_pow(exponent.parse().ok()?)?
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let units: u128 = format!("{whole}{fraction}").parse().ok()?;
    Some(units.checked_mul(factor)?.div_ceil(scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_compared_whatever_their_units() {
        for (text, expected) in [
            ("1Gi", Some(1 << 30)),
            ("1.5Gi", Some(3 << 29)),
            ("10", Some(10)),
            ("2e3", Some(2_000)),
            ("1G", Some(1_000_000_000)),
            ("0.5", Some(1)),
            ("x", None),
            ("1Zi", None),
        ] {
            assert_eq!(bytes(&Quantity(text.into())), expected, "{text}");
        }
    }

    #[test]
    fn volumes_only_grow_and_only_where_their_class_allows_it() {
        let claim = |requested: &str, capacity: Option<&str>, class: &str| {
            let mut claim = json!({
                "metadata": {"name": "data-0"},
                "spec": {"storageClassName": class, "resources": {"requests": {"storage": requested}}},
            });
            if let Some(capacity) = capacity {
                claim["status"] = json!({"capacity": {"storage": capacity}});
            }
            Arc::new(serde_json::from_value(claim).unwrap())
        };
        let class = |name: &str, expands: bool| {
            let class = json!({"metadata": {"name": name}, "provisioner": "x", "allowVolumeExpansion": expands});
            Arc::new(serde_json::from_value(class).unwrap())
        };
        let classes = [class("grows", true), class("fixed", false)];
        for (claim, patched, growing, problem) in [
            (claim("1Gi", Some("1Gi"), "grows"), 1, 1, false),
            (claim("1Gi", Some("1Gi"), "fixed"), 0, 0, true),
            (claim("2Gi", Some("1Gi"), "grows"), 0, 1, false),
            (claim("2048Mi", Some("2Gi"), "fixed"), 0, 0, false),
            (claim("3Gi", Some("3Gi"), "fixed"), 0, 0, false),
            (claim("1Gi", None, "grows"), 0, 0, false),
        ] {
            let found = growth(
                std::slice::from_ref(&claim),
                &classes,
                &Quantity("2Gi".into()),
            );
            assert_eq!(found.patch.len(), patched, "{claim:?}");
            assert_eq!(found.growing, growing, "{claim:?}");
            assert_eq!(found.problem.is_some(), problem, "{claim:?}");
        }
    }
}
