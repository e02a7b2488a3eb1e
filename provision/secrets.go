package provision

// StackSecrets is what one node needs to take part in the IM cluster. It only
// travels over the authenticated node API and is kept in files of mode 0600 or
// tighter.
type StackSecrets struct {
	Cookie string `json:"cookie"` // Erlang distribution cookie, the same on every node
	CA     string `json:"ca"`     // the site's CA certificate, PEM
	Cert   string `json:"cert"`   // certificate for the XMPP domain and this node's name, PEM
	Key    string `json:"key"`    // its private key, PEM
	// Named are the stack file's secrets that this node's components use, by
	// name.
	Named map[string]string `json:"named,omitempty"`
	// Probes are the two accounts of the readiness probe.
	Probes []Account `json:"probes"`
}

// Account is a user of the IM service.
type Account struct {
	User     string `json:"user"` // local part
	Password string `json:"password"`
}
