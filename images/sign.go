package images

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"aead.dev/minisign"
)

const (
	sigSuffix = ".minisig"
	pubSuffix = ".pub"
)

// secretKey signs manifests.
type secretKey struct {
	minisign.PrivateKey
}

// publicKey is a trusted key and the name of its file.
type publicKey struct {
	name string
	text []byte
	key  minisign.PublicKey
}

// GenerateKey makes a key pair: the secret key in the new file path, mode 0600,
// the public key in path.pub. Files that exist are never replaced.
func GenerateKey(path string) error {
	pub, sec, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		return fmt.Errorf("no key could be made: %w", err)
	}
	secText, err := sec.MarshalText()
	if err != nil {
		return fmt.Errorf("no key could be made: %w", err)
	}
	pubText, err := pub.MarshalText()
	if err != nil {
		return fmt.Errorf("no key could be made: %w", err)
	}
	if _, err := os.Stat(path + pubSuffix); err == nil {
		return fmt.Errorf("%s exists and is kept: name another file or remove the old key", path+pubSuffix)
	}
	if err := writeNew(path, append(secText, '\n'), 0o600); err != nil {
		return err
	}
	return writeNew(path+pubSuffix, append(pubText, '\n'), 0o644)
}

func writeNew(path string, b []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists and is kept: name another file or remove the old key", path)
	}
	if err != nil {
		return fmt.Errorf("key file cannot be written: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("%s cannot be written: %w", path, err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("%s cannot be written: %w", path, err)
	}
	return nil
}

// Trust adds the minisign public key in file to the store's trusted keys.
func (s *Store) Trust(file string) error {
	k, err := readPublicKey(file)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(s.dir, "keys", fmt.Sprintf("%016x%s", k.key.ID(), pubSuffix)), k.text)
}

func readPublicKey(file string) (publicKey, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return publicKey{}, fmt.Errorf("public key cannot be read: %w", err)
	}
	k := publicKey{name: filepath.Base(file), text: b}
	if err := k.key.UnmarshalText(bytes.TrimSpace(b)); err != nil {
		return publicKey{}, fmt.Errorf("%s is no minisign public key: %w", file, err)
	}
	return k, nil
}

// VendorKey is the public key that came with this program, a file of minisign
// without its comment; empty in a build that belongs to no set. It is set by the
// linker (-X platter/images.VendorKey=RW...).
var VendorKey string

// trusted are the keys whose signatures count: that of the program and the
// store's own, sorted by file name.
func (s *Store) trusted() ([]publicKey, error) {
	files, err := filepath.Glob(filepath.Join(s.dir, "keys", "*"+pubSuffix))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	return readPublicKeys(files)
}

// readPublicKeys reads keys and puts the program's own before them.
func readPublicKeys(files []string) ([]publicKey, error) {
	var keys []publicKey
	if VendorKey != "" {
		k := publicKey{text: []byte(VendorKey + "\n")}
		if err := k.key.UnmarshalText([]byte(VendorKey)); err != nil {
			return nil, fmt.Errorf("the public key that is built into this program is none: %w", err)
		}
		k.name = fmt.Sprintf("%016x%s", k.key.ID(), pubSuffix)
		keys = append(keys, k)
	}
	for _, f := range files {
		k, err := readPublicKey(f)
		if err != nil {
			return nil, err
		}
		if len(keys) == 0 || !keys[0].key.Equal(k.key) { // the program's again
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// Signatures is CheckSignature without a store: the keys that count are those in
// files and the program's own.
func Signatures(files ...string) (check func(raw, sig []byte) error, err error) {
	keys, err := readPublicKeys(files)
	if err != nil {
		return nil, err
	}
	return func(raw, sig []byte) error { return verify(keys, raw, sig) }, nil
}

// CheckSignature says why sig is not a signature for raw that counts: the keys
// that count are the store's and the program's own.
func (s *Store) CheckSignature(raw, sig []byte) error {
	keys, err := s.trusted()
	if err != nil {
		return err
	}
	return verify(keys, raw, sig)
}

// Sign signs raw, which is called name in the signature's comment, with the
// minisign secret key in keyFile, which the store has to trust. Equal arguments
// give equal signatures.
func (s *Store) Sign(raw []byte, name, keyFile string) ([]byte, error) {
	k, err := s.readSecretKey(keyFile)
	if err != nil {
		return nil, err
	}
	return k.sign(raw, name), nil
}

// readSecretKey reads a secret key that the store trusts: what is signed with
// any other would be refused by every node.
func (s *Store) readSecretKey(file string) (secretKey, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return secretKey{}, fmt.Errorf("signing key cannot be read, 'platter image keygen' makes one: %w", err)
	}
	var k secretKey
	if err := k.UnmarshalText(bytes.TrimSpace(b)); err != nil {
		return secretKey{}, fmt.Errorf("%s is no minisign secret key without password: %w", file, err)
	}
	keys, err := s.trusted()
	if err != nil {
		return secretKey{}, err
	}
	for _, t := range keys {
		if t.key.Equal(k.Public()) {
			return k, nil
		}
	}
	return secretKey{}, fmt.Errorf("image store %s does not trust the key %s (%016X): add its public half with 'platter image trust'", s.dir, file, k.ID())
}

// sign makes a signature that depends on nothing but its arguments.
func (k secretKey) sign(raw []byte, name string) []byte {
	return minisign.SignWithComments(k.PrivateKey, raw, "platter:"+name, untrustedComment)
}

// untrustedComment is the one line of our signatures that none of them covers.
const untrustedComment = "signature from a Platter key"

// PlainSignature tells whether sig is written as ours are, to the bit. Minisign also
// takes one with another comment, or with bits set that its base64 does not use.
func PlainSignature(sig []byte) bool {
	var s minisign.Signature
	if s.UnmarshalText(sig) != nil {
		return false
	}
	s.UntrustedComment = untrustedComment
	plain, err := s.MarshalText()
	return err == nil && bytes.Equal(plain, sig)
}

// verify accepts raw if one of keys made sig for it.
func verify(keys []publicKey, raw, sig []byte) error {
	if len(keys) == 0 {
		return errors.New("there is no trusted key: add one with 'platter image trust'")
	}
	var parsed minisign.Signature
	if err := parsed.UnmarshalText(sig); err != nil {
		return fmt.Errorf("its signature cannot be read: copy the disc again: %w", err)
	}
	known := false
	for _, k := range keys {
		if minisign.Verify(k.key, raw, sig) {
			return nil
		}
		known = known || k.key.ID() == parsed.KeyID
	}
	if known {
		return errors.New("its signature does not fit its content: copy the disc again")
	}
	var names []string
	for _, k := range keys {
		names = append(names, k.name)
	}
	return fmt.Errorf("it is signed by the unknown key %016X, trusted are %s", parsed.KeyID, strings.Join(names, ", "))
}
