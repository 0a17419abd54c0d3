//! Compliance frameworks, and which of their controls a check is evidence for.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A compliance framework.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Framework {
    /// Trust services criteria of the AICPA, 2017.
    #[serde(rename = "SOC2")]
    Soc2,
    /// Security rule of HIPAA, 45 CFR part 164.
    #[serde(rename = "HIPAA")]
    Hipaa,
    /// PCI DSS 4.0.
    #[serde(rename = "PCI_DSS")]
    PciDss,
    /// Regulation (EU) 2016/679.
    #[serde(rename = "GDPR")]
    Gdpr,
    /// Annex A of ISO/IEC 27001:2022.
    #[serde(rename = "ISO27001")]
    Iso27001,
    /// NIST SP 800-53, revision 5.
    #[serde(rename = "NIST")]
    Nist,
}

impl Framework {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Soc2,
        Self::Hipaa,
        Self::PciDss,
        Self::Gdpr,
        Self::Iso27001,
        Self::Nist,
    ];

    /// What it is called in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Soc2 => "SOC2",
            Self::Hipaa => "HIPAA",
            Self::PciDss => "PCI_DSS",
            Self::Gdpr => "GDPR",
            Self::Iso27001 => "ISO27001",
            Self::Nist => "NIST",
        }
    }

    /// The framework of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == word)
    }
}

impl fmt::Display for Framework {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a check is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// Passwords and ways to log in.
    Authentication,
    /// Who may become root.
    LeastPrivilege,
    /// Who may read or change which files.
    Files,
    /// What can be reached in the guest.
    Services,
    /// Settings that make attacks harder.
    Hardening,
    /// What is between the guest and the host.
    Isolation,
    /// What the guest can reach.
    Network,
    /// Who may read disks and memory that were saved.
    StoredData,
    /// Known holes.
    Vulnerabilities,
    /// What was done is on record.
    Audit,
}

impl Area {
    /// Numbers of the controls of a framework that ask for this; none if it does not.
    pub fn controls(self, framework: Framework) -> &'static [&'static str] {
        let [soc2, hipaa, pci, gdpr, iso, nist] = self.table();
        match framework {
            Framework::Soc2 => soc2,
            Framework::Hipaa => hipaa,
            Framework::PciDss => pci,
            Framework::Gdpr => gdpr,
            Framework::Iso27001 => iso,
            Framework::Nist => nist,
        }
    }

    /// In the order of [`Framework::ALL`].
    fn table(self) -> [&'static [&'static str]; 6] {
        match self {
            Self::Authentication => [
                &["CC6.1"],
                &["164.312(a)(2)(i)", "164.312(d)"],
                &["2.2.2", "8.3.1", "8.3.6"],
                &["32(1)(b)"],
                &["A.5.17", "A.8.5"],
                &["IA-2", "IA-5"],
            ],
            Self::LeastPrivilege => [
                &["CC6.1", "CC6.3"],
                &["164.312(a)(1)"],
                &["7.2.1", "7.2.2"],
                &["25(2)"],
                &["A.5.15", "A.8.2"],
                &["AC-6"],
            ],
            Self::Files => [
                &["CC6.1"],
                &["164.312(a)(1)", "164.312(c)(1)"],
                &["2.2.6", "7.2.1"],
                &["32(1)(b)"],
                &["A.8.3"],
                &["AC-3", "AC-6"],
            ],
            Self::Services => [
                &["CC6.6"],
                &["164.312(e)(1)"],
                &["1.2.6", "2.2.4"],
                &[],
                &["A.8.9", "A.8.20"],
                &["CM-7"],
            ],
            Self::Hardening => [
                &["CC6.8", "CC7.1"],
                &[],
                &["2.2.1", "2.2.6"],
                &[],
                &["A.8.9"],
                &["CM-6", "SI-16"],
            ],
            Self::Isolation => [
                &["CC6.1", "CC6.8"],
                &["164.312(a)(1)"],
                &["2.2.3"],
                &["32(1)(b)"],
                &["A.8.22"],
                &["SC-39"],
            ],
            Self::Network => [
                &["CC6.6"],
                &["164.312(e)(1)"],
                &["1.3.2", "1.4.2"],
                &[],
                &["A.8.20", "A.8.22"],
                &["SC-7"],
            ],
            Self::StoredData => [
                &["CC6.1", "CC6.7"],
                &["164.312(a)(1)"],
                &["3.4.1", "7.2.1"],
                &["32(1)(a)"],
                &["A.8.3"],
                &["SC-28"],
            ],
            Self::Vulnerabilities => [
                &["CC7.1"],
                &["164.308(a)(1)(ii)(A)"],
                &["6.3.3", "11.3.1"],
                &["32(1)(d)"],
                &["A.8.8"],
                &["RA-5", "SI-2"],
            ],
            Self::Audit => [
                &["CC7.2"],
                &["164.312(b)"],
                &["10.3.2", "10.3.4"],
                &["5(2)"],
                &["A.8.15"],
                &["AU-9", "AU-10"],
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frameworks_have_their_names_everywhere() {
        for framework in Framework::ALL {
            let word = framework.as_str();
            assert_eq!(Framework::from_word(word), Some(framework));
            assert_eq!(serde_json::to_value(framework).unwrap(), word);
        }
        assert_eq!(Framework::from_word("soc2"), None);
        assert_eq!(
            Area::Vulnerabilities.controls(Framework::PciDss),
            ["6.3.3", "11.3.1"]
        );
        assert!(Area::Hardening.controls(Framework::Hipaa).is_empty());
    }
}
