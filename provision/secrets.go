package provision

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
)

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
	// Load is what the passwords of simulated users are made from, see
	// LoadAccounts.
	Load string `json:"load,omitempty"`
}

// Account is a user of the IM service.
type Account struct {
	User     string `json:"user"` // local part
	Password string `json:"password"`
}

// LoadPrefix begins the names of simulated users, who put load on the service
// for a test. No person may have such a name: the accounts are made, used and
// removed as the tests need them.
const LoadPrefix = "platter-load-"

// LoadAccounts are n simulated users. Names and passwords depend on nothing but
// their number and secret, so that the disc host and a node agree on them
// without sending them.
func LoadAccounts(n int, secret []byte) []Account {
	var out []Account
	for i := range n {
		user := fmt.Sprintf("%s%06d", LoadPrefix, i+1)
		h := hmac.New(sha256.New, secret)
		h.Write([]byte(user))
		out = append(out, Account{User: user, Password: base64.RawURLEncoding.EncodeToString(h.Sum(nil))})
	}
	return out
}
