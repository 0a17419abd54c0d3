//! For which compliance frameworks a record counts.
//!
//! | records of | frameworks | for what they ask |
//! |---|---|---|
//! | accounts and API keys, and everything that was denied | SOC2, HIPAA, PCI_DSS, GDPR, ISO27001, NIST | access to be controlled and each use of it recorded: SOC 2 CC6.1, HIPAA 164.312(b), PCI DSS 10.2, GDPR art. 32, ISO 27001 A.8.15, NIST AU-2 |
//! | commands and files | SOC2, HIPAA, GDPR, ISO27001 | access to data to be recorded: SOC 2 CC7.2, HIPAA 164.312(b), GDPR art. 30, ISO 27001 A.8.15 |
//! | everything else | SOC2, ISO27001 | changes of systems to be recorded: SOC 2 CC8.1, ISO 27001 A.8.32 |

/// For which frameworks a record of this counts.
pub fn frameworks(
    action_type: &str,
    resource_type: &str,
    outcome: &str,
) -> &'static [&'static str] {
    let is_access = matches!(resource_type, "user" | "api_key") || outcome == "denied";
    let is_data = ["exec", "file", "pty", "command", "process"]
        .iter()
        .any(|word| action_type.contains(word));
    match (is_access, is_data) {
        (true, _) => &["SOC2", "HIPAA", "PCI_DSS", "GDPR", "ISO27001", "NIST"],
        (false, true) => &["SOC2", "HIPAA", "GDPR", "ISO27001"],
        (false, false) => &["SOC2", "ISO27001"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_for_what() {
        assert_eq!(frameworks("user_login", "user", "success").len(), 6);
        assert_eq!(frameworks("vm_create", "vm", "denied").len(), 6);
        assert_eq!(frameworks("vm_files_write", "vm", "success").len(), 4);
        assert_eq!(
            frameworks("vm_create", "vm", "success"),
            ["SOC2", "ISO27001"]
        );
    }
}
